"""What a layout of weights is: the names and shapes of a ConvNeXt V2 in the files of one project, both ways.

Our own names and shapes are those of the official dense network; every layout is read into them and written from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convnextv2.models.config import NUM_STAGES, EncoderConfig

if TYPE_CHECKING:
    from torch import Tensor

DECODER_PARTS = ("mask_token", "proj", "decoder", "pred")
HEAD_PARTS = ("norm", "head")

Rules = tuple[tuple[str, str], ...]
"""Pairs of a pattern and its replacement, applied one after the other as :func:`re.sub` does."""


def read_plainly(name: str, source: str, tensor: Tensor) -> Tensor:
    """Our shape of a tensor: GRN with four axes, and 1×1 convolutions (four axes) as linear layers."""
    if name.startswith("stages.") and ".grn." in name:
        return tensor.reshape(1, 1, 1, -1)
    return tensor.flatten(1) if re.search(r"\.pwconv[12]\.weight$", name) and tensor.dim() == 4 else tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All that is known of one project's files. A new one is a file in ``layouts/`` that defines ``LAYOUT``.

    Args:
        name: as ``--to`` of the converter and the metadata of files name it.
        about: the layout in one line, for the converter's help.
        recognises: whether a state dict with these names is in this layout, and so in no other.
        names: turn a name of the dense network or of its head into the layout's. The decoder keeps its names.
        spellings: turn other spellings that files occur in into the one that ``names`` gives; for reading only.
        parts: what is written to a file, of encoder, decoder and head.
        target: whether the converter offers it.
        read: our tensor from our name, the file's name (for messages) and the file's tensor.
        write: the file's tensor from our name, our tensor and the encoder's shape.
        sparse_features: features ``[P, C]`` of the visible patches, from a state dict in this layout, images
            ``[B, C, H, W]`` and the visible patches ``[B, gh, gw]``, by code that shares nothing with this one.
            Verification then runs it in place of our sparse encoder.
        dense_features: features ``[B, C, h, w]`` by the project's own network, from a state dict in this layout, the
            encoder's shape and images ``[B, C, H, W]``.
        leaves: pattern of names that files may hold beside the network; :func:`re.match` finds what is left out.
        norm: whether the project's network always has a final norm; the converter writes one where there is none.
        loading: lines that tell how a file is loaded there, from what it will hold, the encoder's shape and its path.
            CheckpointError if the project's own network, as its users build it, would not take it; nothing is written.
    """

    name: str
    about: str
    recognises: Callable[[Collection[str]], bool]
    names: Rules = ()
    spellings: Rules = ()
    parts: tuple[str, ...] = ("encoder", "head")
    target: bool = False
    read: Callable[[str, str, Tensor], Tensor] = read_plainly
    write: Callable[[str, Tensor, EncoderConfig], Tensor] = lambda name, tensor, config: tensor
    sparse_features: Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor] | None = None
    dense_features: Callable[[Mapping[str, Tensor], EncoderConfig, Tensor], Tensor] | None = None
    leaves: str = ""
    norm: bool = False
    loading: Callable[[Mapping[str, Tensor], EncoderConfig, str], list[str]] = lambda state_dict, config, path: []

    def name_of(self, name: str) -> str:
        """The layout's name of a tensor of the dense network, of its head, or of the decoder."""
        return name if part_of(name) == "decoder" else _rewrite(name, self.names)

    def spelt(self, name: str) -> str:
        """A name in a file as :meth:`name_of` would give it."""
        return _rewrite(name, self.spellings)


def _rewrite(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def part_of(name: str) -> str:
    """``encoder``, ``decoder`` or ``head``: what a tensor with this name of ours belongs to."""
    first = name.split(".")[0]
    return "decoder" if first in DECODER_PARTS else "head" if first in HEAD_PARTS else "encoder"


def known_names(blocks: int) -> Iterator[str]:
    """Every name of the dense network, its head and the decoder, with up to ``blocks`` blocks a stage."""
    ends = ("weight", "bias")
    block = [f"{layer}.{end}" for layer in ("dwconv", "norm", "pwconv1", "pwconv2") for end in ends]
    block += ["grn.gamma", "grn.beta"]
    yield from (f"downsample_layers.{i}.{j}.{end}" for i in range(NUM_STAGES) for j in (0, 1) for end in ends)
    yield from (f"stages.{i}.{j}.{end}" for i in range(NUM_STAGES) for j in range(blocks) for end in block)
    yield from (f"decoder.{j}.{end}" for j in range(blocks) for end in block)
    yield from (f"{part}.{end}" for part in (*HEAD_PARTS, "proj", "pred") for end in ends)
    yield "mask_token"

"""Weights of any layout, read into one form, checked to be complete, and written in another layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import NUM_STAGES, EncoderConfig, FCMAEConfig, variant_name
from convnextv2.models.encoder import Encoder
from convnextv2.models.fcmae import FCMAE
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError, Config, as_checkpoint
from convnextv2.weights.layout import Layout, known_names, part_of
from convnextv2.weights.layouts import detect_layout, get_layout
from convnextv2.weights.stated import classifier_config, compare
from convnextv2.weights.unwrapping import unwrapped

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LEAST_A_BLOCK = 5
"""Tensors of a block, which has ten, below which it is not worth building a network to say which are missing."""


@dataclass(frozen=True)
class Weights:
    """Weights in the names and shapes of the official dense network, whatever layout they came in.

    Args:
        layout: name of the layout they were read from.
        config: the encoder's shape, read from the weights.
        encoder: stem, downsampling and stages; complete.
        decoder: mask token, projection, decoder and prediction of a masked autoencoder; complete or empty.
        head: final norm and head of a classifier: both, the norm alone, or empty.
        names: for each name here, the name in the source.
        widened: whether 16-bit weights were widened to float32.
    """

    layout: str
    config: EncoderConfig
    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    head: dict[str, Tensor]
    names: dict[str, str]
    widened: bool = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter({**self.encoder, **self.decoder, **self.head}.items())

    @property
    def num_classes(self) -> int | None:
        """Outputs of the head, or None without one."""
        return self.head["head.weight"].shape[0] if "head.weight" in self.head else None


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return f"{', '.join(listed[:3])}{f' and {len(listed) - 3} more' if len(listed) > 3 else ''}"


def _translate(state_dict: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], dict[str, str]]:
    numbers = (int(number) for name in state_dict for number in re.findall(r"\.(\d{1,3})(?=\.)", name))
    blocks = min(max(numbers, default=0) + 1, len(state_dict))
    known = {layout.name_of(name): name for name in known_names(blocks)}
    names: dict[str, str] = {}
    for source in state_dict:
        if (name := known.get(layout.spelt(source))) is not None:
            names.setdefault(name, source)
    if unknown := state_dict.keys() - names.values():
        v1 = any(re.search(r"\.(\d+)\.(gamma|layer_scale_parameter)$", name) for name in unknown)
        hint = "; layer scale makes this a ConvNeXt V1, which has no GRN" if v1 else ""
        raise CheckpointError(f"{len(unknown)} tensors do not belong to a ConvNeXt V2 ({_some(unknown)}){hint}")
    return {name: layout.read(name, source, state_dict[source]) for name, source in names.items()}, names


def _count(names: Iterable[str], prefix: str) -> int:
    """One more than the highest index below ``prefix``."""
    indices = {int(name[len(prefix) :].split(".")[0]) for name in names if name.startswith(prefix)}
    return max(indices, default=-1) + 1


def _encoder_config(weights: Mapping[str, Tensor]) -> EncoderConfig:
    """Depths, widths, channels, patch and kernel size from tensors in the dense network's names and shapes."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in weights:
            raise CheckpointError(f"incomplete: {name} is missing")
        if weights[name].dim() != rank:
            raise CheckpointError(f"{name} should have {rank} axes, its shape is {list(weights[name].shape)}")
        return tuple(weights[name].shape)

    stem = shape("downsample_layers.0.0.weight", 4)
    dims = (stem[0], *(shape(f"downsample_layers.{i}.1.weight", 4)[0] for i in range(1, NUM_STAGES)))
    depths = tuple(_count(weights, f"stages.{i}.") for i in range(NUM_STAGES))
    kernel_size = shape("stages.0.0.dwconv.weight", 4)[-1]
    patch_size = stem[-1] * 2 ** (NUM_STAGES - 1)
    try:
        return EncoderConfig(cast(Any, depths), cast(Any, dims), stem[1], patch_size, kernel_size)
    except ValueError as error:
        raise CheckpointError(f"the weights are of no network that we have: {error}") from error


def _decoder_config(encoder: EncoderConfig, decoder: Mapping[str, Tensor]) -> FCMAEConfig:
    if "mask_token" not in decoder:
        raise CheckpointError("incomplete: there is a decoder, but mask_token is missing")
    depth, width = _count(decoder, "decoder."), decoder["mask_token"].numel()
    side = 7 * encoder.patch_size
    try:
        return FCMAEConfig(encoder, (side, side), decoder_depth=depth, decoder_dim=width)
    except ValueError as error:
        raise CheckpointError(f"the decoder is incomplete: {error}") from error


@lru_cache(maxsize=8)
def _shapes(part: str, network: Callable[[Any], nn.Module], config: Config) -> Mapping[str, torch.Size]:
    """Names and shapes of a part of a network; cached because building one takes seconds for the large variants."""
    with torch.device("meta"):
        state = network(config).state_dict()
    return {name: tensor.shape for name, tensor in state.items() if part_of(name) == part}


def _check(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size], names: Mapping[str, str]) -> None:
    if missing := expected.keys() - found.keys():
        raise CheckpointError(f"incomplete: {len(missing)} tensors are missing ({_some(missing)})")
    if unexpected := found.keys() - expected.keys():
        raise CheckpointError(f"{len(unexpected)} tensors too many ({_some(unexpected)})")
    for name, tensor in found.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(f"{names[name]} has the shape {list(tensor.shape)}, expected {list(expected[name])}")


def read_weights(state_dict: Mapping[str, Tensor]) -> Weights:
    """Weights of any known layout, checked to be complete, of the right shapes and finite.

    Weights of 16 bits are widened to float32, which loses nothing; others keep their dtype. Raises CheckpointError if
    they are not a whole ConvNeXt V2: the only parts that may be missing are the decoder, and the final norm and head.
    """
    state_dict = unwrapped(state_dict)
    layout = detect_layout(state_dict)
    found, names = _translate(state_dict, get_layout(layout))
    for name, tensor in found.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{names[name]} holds {tensor.dtype}; quantised weights cannot be converted")
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{names[name]} holds NaN or infinity: the training that wrote it had diverged")
    narrow = {name for name, tensor in found.items() if tensor.dtype in (torch.float16, torch.bfloat16)}
    encoder, decoder, head = (
        {name: found[name].float() if name in narrow else found[name] for name in found if part_of(name) == part}
        for part in ("encoder", "decoder", "head")
    )
    config = _encoder_config(encoder)
    if len(encoder) < LEAST_A_BLOCK * sum(config.depths):
        raise CheckpointError(f"incomplete: {len(encoder)} tensors for {sum(config.depths)} blocks")
    _check(encoder, _shapes("encoder", Encoder, config), names)
    if decoder:
        _check(decoder, _shapes("decoder", FCMAE, _decoder_config(config, decoder)), names)
    if head:
        if "head.bias" in head and "head.weight" not in head:
            raise CheckpointError("incomplete: head.bias without head.weight")
        _check(head, _shapes("head", ConvNeXtV2, classifier_config(config, head)), names)
    return Weights(layout, config, encoder, decoder, head, names, bool(narrow))


def weights_config(weights: Weights) -> Config:
    """Configuration of a network with these: an FCMAEConfig if there is a decoder (image size and mask ratio are
    not in the weights: 7×7 patches and 0.6), a ClassifierConfig if there is a final norm, else an EncoderConfig."""
    if weights.decoder:
        return _decoder_config(weights.config, weights.decoder)
    return classifier_config(weights.config, weights.head) if weights.head else weights.config


def read_checkpoint(checkpoint: Checkpoint) -> Weights:
    """:func:`read_weights`, with the file named in errors; also if its configuration is of other weights."""
    try:
        weights = read_weights(checkpoint.state_dict)
        if checkpoint.config is not None:
            compare(checkpoint.config, weights_config(weights))
        return weights
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def encoder_state_dict(checkpoint: Checkpoint | str | Path) -> dict[str, Tensor]:
    """The encoder's weights in the dense network's names, from a checkpoint of any layout; raises CheckpointError as
    :func:`~convnextv2.weights.checkpoint.load_checkpoint` and :func:`read_weights`."""
    return read_checkpoint(as_checkpoint(checkpoint)).encoder


def with_norm(weights: Weights) -> Weights:
    """The weights with a final norm, as it is initialised (ones and zeros) where they have none: for a network that
    always has one, such as timm's."""
    like = weights.encoder["downsample_layers.3.1.bias"]
    norm = {"norm.weight": torch.ones_like(like), "norm.bias": torch.zeros_like(like)}
    return replace(weights, head=weights.head or norm)


def write_layout(weights: Weights, layout: str) -> dict[str, Tensor]:
    """State dict in another layout, with the parts that the layout holds.

    The dense layouts leave the decoder out; ``fcmae`` and ``sparse-official`` leave final norm and head out. Raises
    ValueError if no layout has that name, CheckpointError if the layout cannot have these weights.
    """
    target = get_layout(layout)
    return {
        target.name_of(name): target.write(name, tensor, weights.config)
        for part in target.parts
        for name, tensor in getattr(weights, part).items()
    }


def describe(config: EncoderConfig) -> str:
    """The encoder in words, for messages."""
    name = variant_name(config) or "a custom ConvNeXt V2"
    kernel = "" if config.kernel_size == 7 else f", kernel size {config.kernel_size}"
    return (
        f"{name} (depths {'-'.join(map(str, config.depths))}, widths {'-'.join(map(str, config.dims))}, "
        f"{config.in_chans} channels, patch size {config.patch_size}{kernel})"
    )

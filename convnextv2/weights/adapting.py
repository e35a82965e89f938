"""A stem for other images: a checkpoint's weights for another number of channels, or another patch size.

The stem alone depends on either. Its kernel is ``[D, C, k, k]``, with k an eighth of the patch size. Every rule here is
linear in the kernel and keeps the answer to an image that is the same everywhere and in all channels, but for timm's
rule from three channels to a number that is no multiple of three (docs/checkpoints.md).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convnextv2.models.config import EncoderConfig
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError
from convnextv2.weights.reading import Weights, describe, read_checkpoint

STEM = "downsample_layers.0.0.weight"


def read_for(config: EncoderConfig, checkpoint: Checkpoint, bands: str | None = None) -> tuple[Weights, str]:
    """The weights of a checkpoint for this encoder, and what was done to the stem, in words; empty for nothing.

    Stochastic depth is no matter of weights. Where the stem is another, a decoder comes without its last layer, whose
    outputs are pixels.

    Args:
        config: of the network.
        checkpoint: of any layout.
        bands: see :func:`parse_bands`.

    Raises:
        CheckpointError: if the file cannot be read, or is of another network in more than channels and patch size.
        ValueError: if ``bands`` do not fit.
    """
    weights, own = read_checkpoint(checkpoint), replace(config, drop_path_rate=0.0)
    there = weights.config
    if replace(there, in_chans=own.in_chans, patch_size=own.patch_size) != own:
        raise CheckpointError(
            f"{checkpoint.path}: holds {describe(there)}, but the network is {describe(own)}; "
            "choose the model that the checkpoint is of"
        )
    said, stem = [], weights.encoder[STEM]
    chosen = parse_bands(bands, there.in_chans, own.in_chans)
    if there.patch_size != own.patch_size:
        stem = other_stride(stem, own.stem_stride)
        said.append(f"patch size {there.patch_size} to {own.patch_size}")
    if chosen is not None:
        stem = mapped_channels(stem, chosen)
        said.append(f"{there.in_chans} to {own.in_chans} channels as `init_bands` says")
    elif there.in_chans != own.in_chans:
        stem = other_channels(stem, own.in_chans)
        said.append(f"{there.in_chans} to {own.in_chans} channels")
    if not said:
        return weights, ""
    decoder = {name: value for name, value in weights.decoder.items() if not name.startswith("pred.")}
    changed = replace(weights, config=own, encoder={**weights.encoder, STEM: stem}, decoder=decoder)
    return changed, f"the stem is adapted, {' and '.join(said)}"


def other_stride(kernel: Tensor, size: int) -> Tensor:
    """A stem's kernel ``[D, C, k, k]`` for another stride, ``[D, C, size, size]``; one side divides the other.

    The least-squares solution for images resized by a box filter (FlexiViT, section 3.4, with a box filter; with
    bicubic weights, timm's ``resample_patch_embed``, the answer to a constant image would change). A smaller kernel
    answers to an image what the larger one answers to it enlarged, each pixel repeated; a larger one what the smaller
    one answers to the image reduced, by means over blocks. So does the whole network, to rounding.
    """
    side = kernel.shape[-1]
    if size < side:
        step = side // size
        return kernel.unflatten(3, (size, step)).unflatten(2, (size, step)).sum((3, 5))
    step = size // side
    return kernel.repeat_interleave(step, 2).repeat_interleave(step, 3) / step**2


def other_channels(kernel: Tensor, channels: int) -> Tensor:
    """A stem's kernel ``[D, C, k, k]`` for other channels, ``[D, channels, k, k]``, by their number alone.

    From three channels as timm does: to one their sum, to others repeated and scaled by 3 / channels. Else, to fewer:
    the first ones, each with an equal share of what is left out, as if those bands were the mean of these; to more:
    repeated, each divided by how often it occurs.
    """
    count = kernel.shape[1]
    if count == 3:
        from timm.models import adapt_input_conv

        return adapt_input_conv(channels, kernel)
    if channels < count:
        return mapped_channels(kernel, range(channels))
    sources = torch.arange(channels, device=kernel.device) % count
    return kernel[:, sources] / torch.bincount(sources)[sources].to(kernel.dtype)[:, None, None]


def mapped_channels(kernel: Tensor, sources: Sequence[int | None]) -> Tensor:
    """A stem's kernel ``[D, C, k, k]`` for channels of which it is known what they are, ``[D, len(sources), k, k]``.

    Args:
        kernel: of the file.
        sources: for each channel here the one that it is there, or None. These start at zero: what the network gives
            at first is what it gave without them. What is left out there is taken to be the mean of what is not, and
            its weights are shared equally.
    """
    known = [place for place, source in enumerate(sources) if source is not None]
    taken = [source for source in sources if source is not None]
    left_out = [source for source in range(kernel.shape[1]) if source not in taken]
    result = kernel.new_zeros(kernel.shape[0], len(sources), *kernel.shape[2:])
    result[:, known] = kernel[:, taken] + kernel[:, left_out].sum(1, keepdim=True) / len(known)
    return result


def parse_bands(text: str | None, there: int, here: int) -> list[int | None] | None:
    """Of ``init_bands``, such as ``0,3,2,1``: for each channel of the images the file's, from 0; None for 0.

    Args:
        text: numbers, one for each channel of the images, each of the file's channels (from 1) at most once; 0 is
            none. None or empty text gives None.
        there, here: channels of the file, and of the images.

    Raises:
        ValueError: if they are others.
    """
    if not text:
        return None
    if not re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9})*\s*", text, re.ASCII):
        raise ValueError(
            f"`init_bands` must be whole numbers with commas between them, as in 0,3,2,1, got {text!r:.60}"
        )
    numbers = [int(part) for part in text.split(",")]
    taken = [number for number in numbers if number]
    if len(numbers) != here or not taken or max(taken) > there or len(set(taken)) < len(taken):
        raise ValueError(
            f"`init_bands` must be {here} numbers, one for each channel of the images: each of the {there} channels of "
            f"`init`, from 1, at most once, or 0 for none; got {text!r:.60}"
        )
    return [number - 1 if number else None for number in numbers]

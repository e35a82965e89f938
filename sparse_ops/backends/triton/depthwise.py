"""The depthwise convolution and its weight gradient as operators, and the block shapes of their kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ops.active_set import ActiveSet, reach
from sparse_ops.backends.triton.launch import PROGRAMS, interpreting, kernels_of, launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_SIZES = (3, 5, 7)
TILE, TILE_OF_ANY = 8, 4
"""Cells a side that a program takes for a patch, also at widths without kernels of their own, whose addresses take
registers; larger patches are cut into tiles."""


def tiles_of(active: ActiveSet, kernel_size: int, channels: int) -> tuple[Tensor, int]:
    """The table of tiles that the kernels for ``channels`` take, and cells a side of a tile."""
    side = tile_side(active.side, channels)
    return active.tile_neighbours(kernel_size, side), side


class ProgramShape(NamedTuple):
    """What one program, of one warp, takes at a time: patches and channels."""

    patches: int
    channels: int


class Stage(NamedTuple):
    """What a kernel knows of its inputs when it is compiled."""

    channels: int
    """Or :data:`ANY`."""
    side: int
    kernel_size: int
    reach: int


INTERPRETED = ProgramShape(16, 64)
"""In the interpreter, where every program costs much the same however much it takes."""

ANY = 0
"""Of ``channels``: the kernel that takes any width, with more arithmetic for addresses."""


def kernel_width(channels: int) -> int:
    """``channels``, where that width has kernels of its own; networks have such widths. Else :data:`ANY`."""
    return channels if channels >= 32 and channels % 8 == 0 else ANY


def tile_side(side: int, channels: int) -> int:
    """Cells a side of what a program takes for a patch of ``side``."""
    return min(side, TILE_OF_ANY if kernel_width(channels) == ANY else TILE)


def program_shape(side: int, channels: int) -> ProgramShape:
    """Of both kernels: as many channels as registers hold sums and taps for, fewer where lanes would be idle.

    A thread has 64 sums and 49 taps of one channel at 8 cells a side, fewer sums and so two channels elsewhere. Two
    patches and 16 channels are taken for 40 and 48: a quarter fewer lanes, for an eighth more of multiply-adds on
    neighbours that only one of both has.
    """
    if interpreting():
        return INTERPRETED
    if channels == ANY:
        return ProgramShape(1, 32)
    lanes = {block: -(-channels // block) * block for block in (16, 32, 64)}
    if 4 * lanes[16] <= 3 * lanes[32]:
        return ProgramShape(2, 16)
    return ProgramShape(1, 64 if side < 8 and lanes[64] == lanes[32] else 32)


def slice_length(patches: int, blocks: int, least: int, shape: ProgramShape) -> int:
    """Patches that a program takes one after the other, ``least`` or more: about :data:`PROGRAMS` programs in all, by
    the shapes alone."""
    wanted = 2 if interpreting() else max(1, PROGRAMS // blocks)
    return -(-max(least, -(-patches // wanted)) // shape.patches) * shape.patches


def _stage(side: int, channels: int, kernel_size: int) -> tuple[ProgramShape, int, dict[str, Any]]:
    """What a program takes, how many take all channels, and what is known when the kernel is compiled."""
    stage = Stage(kernel_width(channels), side, kernel_size, reach(kernel_size, side))
    shape = program_shape(side, stage.channels)
    constants = {"STAGE": stage, "PATCHES": shape.patches, "BLOCK": shape.channels, "num_warps": 1}
    return shape, -(-channels // shape.channels), constants


@torch.library.custom_op("sparse_ops::triton_depthwise", mutates_args=())
def triton_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, side: int, reverse_taps: bool,
    add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See :meth:`sparse_ops.backend.Backend.depthwise`; ``neighbours`` is the table of tiles ``[P, (2R + 1)²]``.

    Weight and bias are of any floating-point dtype. ``add`` ``[N, C]`` is added to the result, in float32, which then
    has its dtype.
    """
    x, weight = x.contiguous(), weight.contiguous()
    bias, add = (None if tensor is None else tensor.contiguous() for tensor in (bias, add))
    out = torch.empty_like(x if add is None else add)
    patches, channels, kernel_size = neighbours.shape[0], x.shape[1], weight.shape[-1]
    if not patches or not channels:
        return out
    shape, blocks, constants = _stage(side, channels, kernel_size)
    length = slice_length(patches, blocks, max(1, 4 // side), shape)  # to load the taps takes as long as four cells
    # The gradient for x takes the same kernel, which takes seconds to compile: order and bias are run-time numbers.
    taps = (kernel_size**2 - 1, -1) if reverse_taps else (0, 1)
    sizes = patches, length, *taps, int(bias is not None), channels
    tensors = x, weight, weight if bias is None else bias, add, neighbours, out
    launch(kernels_of("depthwise").depthwise_kernel, (-(-patches // length), blocks), *tensors, *sizes, **constants)
    return out


@triton_depthwise.register_fake
def _(x: Tensor, *rest: Any, add: Tensor | None = None) -> Tensor:
    like = next((tensor for tensor in (add, *rest[5:]) if tensor is not None), x)
    return x.new_empty(x.shape, dtype=like.dtype)


@torch.library.custom_op("sparse_ops::triton_depthwise_weight_grad", mutates_args=())
def triton_depthwise_weight_grad(
    x: Tensor, grad: Tensor, neighbours: Tensor, side: int, kernel_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See :meth:`sparse_ops.backend.Backend.depthwise_grads`; the gradients have ``dtype``."""
    x, grad = x.contiguous(), grad.contiguous()
    patches, channels, taps = neighbours.shape[0], x.shape[1], kernel_size**2
    stored = torch.float32 if interpreting() else dtype  # the interpreter cuts off what does not fit into 16 bits
    grads = x.new_empty(channels, 1, kernel_size, kernel_size, dtype=stored), x.new_empty(channels, dtype=stored)
    if not patches or not channels:
        return grads[0].zero_().to(dtype), grads[1].zero_().to(dtype)
    shape, blocks, constants = _stage(side, channels, kernel_size)
    length = slice_length(patches, blocks, 16 // side, shape)  # fewer, and partial sums are most of what is written
    slices = -(-patches // length)
    partial = x.new_empty(slices, taps + 1, channels, dtype=torch.float32)
    kernel, sizes = kernels_of("depthwise").depthwise_weight_grad_kernel, (patches, length, channels)
    launch(kernel, (slices, blocks), x, grad, neighbours, partial, *sizes, **constants)
    width = 64 if interpreting() else 32
    grid = taps + 1, -(-channels // width)
    constants = {"TAPS": taps, "ROWS": 32, "BLOCK": width, "num_warps": 4}
    launch(kernels_of("depthwise_sum").depthwise_sum_kernel, grid, partial, *grads, slices, channels, **constants)
    return grads[0].to(dtype), grads[1].to(dtype)


@triton_depthwise_weight_grad.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    kernel, dtype = rest[-2:]
    return x.new_empty(x.shape[1], 1, kernel, kernel, dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)

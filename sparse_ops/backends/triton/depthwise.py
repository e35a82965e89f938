"""The depthwise convolution and its weight gradient as operators, and the block shapes of their kernels."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ops.active_set import reach
from sparse_ops.backends.triton.launch import PROGRAMS, compiling_only, interpreting, kernels_of, launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_SIZES = (3, 5, 7)
TUNED_FROM = 2**20
"""Numbers in the features from which block shapes are timed; smaller inputs say little, and take the first shape."""


class ProgramShape(NamedTuple):
    """What one program takes: patches, channels, and the warps that share them."""

    patches: int
    channels: int
    warps: int


class Stage(NamedTuple):
    """What a kernel knows of its inputs when it is compiled."""

    channels: int
    """Or :data:`ANY`."""
    side: int
    kernel_size: int
    reach: int


INTERPRETED = {
    "depthwise_kernel": {"PATCHES": 64, "BLOCK": 64},
    "depthwise_weight_grad_kernel": {"PATCHES": 16, "BLOCK": 64},
}
"""What one program takes in the interpreter, where every program costs much the same however much it takes."""

TILE, WEIGHT_TILE = 4, 8
"""Cells a side that the convolution and the weight gradient take for a patch; larger ones are cut into tiles."""

ANY = 0
"""Of ``channels``: the kernel that takes any width, with more arithmetic for addresses."""


def kernel_width(channels: int) -> int:
    """``channels``, where that width has kernels of its own; networks have such widths. Else :data:`ANY`."""
    return channels if channels >= 32 and channels % 8 == 0 else ANY


def _widths(candidates: tuple[int, ...], channels: int) -> list[int]:
    """The two of the numbers of channels a program that leave the fewest idle; the best is first."""
    return sorted(candidates, key=lambda block: -(-channels // block) * block)[:2]


def depthwise_blocks(side: int, channels: int) -> list[ProgramShape]:
    """Shapes of the convolution's programs worth trying: one patch and one warp."""
    if channels == ANY:
        return [ProgramShape(1, 32, 1)]
    return [ProgramShape(1, block, 1) for block in _widths((64, 32) if side > 2 else (256, 128, 64, 32), channels)]


def weight_grad_blocks(side: int, channels: int) -> list[ProgramShape]:
    """Those of the weight gradient: 8 numbers a thread, on one warp if possible; 4 where registers are few."""
    if channels == ANY:
        widths, warp = [32], 128
    else:
        widths, warp = _widths((64, 32, 128, 16) if side < 8 else (64, 32, 128), channels), 256  # 16 of 8 spill
    patches = [max(1, 256 // (side * block)) for block in widths]
    return [ProgramShape(p, block, p * side * block // warp) for p, block in zip(patches, widths, strict=True)]


@cache
def _tuned(name: str, stage: Stage, dtype: torch.dtype) -> Any:
    """The kernel, which times the block shapes when it first runs and keeps the fastest, also on disk."""
    import triton

    blocks = depthwise_blocks if name == "depthwise_kernel" else weight_grad_blocks
    configs = [
        triton.Config({"PATCHES": block.patches, "BLOCK": block.channels}, num_warps=block.warps)
        for block in blocks(stage.side, stage.channels)
    ]
    tune = triton.autotune(configs, key=["STAGE"], cache_results=True)
    return tune(getattr(kernels_of("depthwise"), name))


def _launch_depthwise(name: str, grid: Any, side: int, kernel_size: int, x: Tensor, *args: Any) -> None:
    channels = x.shape[1]
    stage = Stage(kernel_width(channels), side, kernel_size, reach(kernel_size, side))
    constants: dict[str, Any] = {"STAGE": stage}
    if interpreting():
        kernel, constants = getattr(kernels_of("depthwise"), name), constants | INTERPRETED[name]
    else:
        kernel = _tuned(name, stage, x.dtype)
        chosen = getattr(kernel, "best_config", None)
        if chosen is None and x.numel() < TUNED_FROM and not compiling_only():
            chosen = kernel.configs[0]
        if chosen is not None:  # past the autotuner, which takes as long as a launch
            kernel, constants = kernel.fn, constants | chosen.all_kwargs()
    launch(kernel, grid, x, *args, channels, **constants)


@torch.library.custom_op("sparse_ops::triton_depthwise", mutates_args=())
def triton_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, side: int, reverse_taps: bool
) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.depthwise`; ``neighbours`` is the table of tiles ``[P, (2R + 1)²]``."""
    out = torch.empty_like(x)
    patches, channels, kernel_size = neighbours.shape[0], x.shape[1], weight.shape[-1]
    if not patches or not channels:
        return out
    # The gradient for x takes the same kernel, which takes seconds to compile: taps are reversed here.
    taps = weight.new_empty(kernel_size**2 + 1, channels, dtype=torch.float32)
    taps[:-1] = (weight.flatten(1).flip(1) if reverse_taps else weight.flatten(1)).t()
    taps[-1] = 0 if bias is None else bias

    def grid(sizes: dict[str, int]) -> tuple[int, int]:
        return -(-patches // sizes["PATCHES"]), -(-channels // sizes["BLOCK"])

    _launch_depthwise("depthwise_kernel", grid, side, kernel_size, x, taps, neighbours, out, patches)
    return out


triton_depthwise.register_fake(lambda x, *_: torch.empty_like(x))


@torch.library.custom_op("sparse_ops::triton_depthwise_weight_grad", mutates_args=())
def triton_depthwise_weight_grad(x: Tensor, grad: Tensor, neighbours: Tensor, side: int, kernel_size: int) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.depthwise_weight_grad`."""
    patches, channels = neighbours.shape[0], x.shape[1]
    slices = weight_grad_slices(patches, channels, side, kernel_size)
    if not slices:
        return x.new_zeros(channels, 1, kernel_size, kernel_size)
    partial = x.new_empty(slices, kernel_size**2, channels, dtype=torch.float32)

    def grid(sizes: dict[str, int]) -> tuple[int, int, int]:
        return slices, -(-channels // sizes["BLOCK"]), kernel_size

    _launch_depthwise("depthwise_weight_grad_kernel", grid, side, kernel_size, x, grad, neighbours, partial, patches)
    return partial.sum(0).t().to(x.dtype).contiguous().view(channels, 1, kernel_size, kernel_size)


@triton_depthwise_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, neighbours: Tensor, side: int, kernel_size: int) -> Tensor:
    return x.new_empty(x.shape[1], 1, kernel_size, kernel_size)


def weight_grad_slices(patches: int, channels: int, side: int, kernel_size: int) -> int:
    """Partial sums of the weight gradient; each costs ``K²·C`` numbers, and has 32 patches or 256 cells at least."""
    least = max(1, 256 // side**2) if side > 2 else 32
    wanted = 2 if interpreting() else PROGRAMS // (kernel_size * max(1, channels // 64))
    return min(-(-patches // least), max(1, wanted))

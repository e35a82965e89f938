"""The backend for NVIDIA GPUs: Triton kernels for float32, bfloat16 and float16, with sums in float32.

With ``TRITON_INTERPRET=1`` the same kernels run in Triton's interpreter on tensors in main memory: slow, and meant for
tests.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ops.active_set import ActiveSet, reach
from sparse_ops.backend import Backend
from sparse_ops.backends._operators import run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_SIZES = (3, 5, 7)
PROGRAMS = 2048
"""About how many programs the weight gradient is cut into: some for each multiprocessor of any GPU. A constant, so that
the order of the sum, and with it the last bits, depend on the shapes alone."""


class Block(NamedTuple):
    """What one program takes: patches, channels, and the warps that share them."""

    patches: int
    channels: int
    warps: int


INTERPRETED = Block(patches=16, channels=64, warps=1)
"""For the interpreter, where every program costs the same however much it takes."""


def blocks(side: int, channels: int) -> list[Block]:
    """Block shapes worth trying, the likeliest first: some 8 to 16 numbers a thread, and few idle channels."""
    found = []
    for block_channels in (64, 32, 16, 128):
        if block_channels >= 2 * channels and block_channels > 16:
            continue
        for patches in (1, 2, 4, 8, 16):
            numbers = patches * side * block_channels
            if 256 <= numbers <= 1024:
                found.append(Block(patches, block_channels, max(1, numbers // 256)))
    return found[:8]


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _kernels() -> Any:
    from sparse_ops.backends import _triton_kernels

    return _triton_kernels


@cache
def _tuned(name: str, side: int, channels: int) -> Any:
    """The kernel, which times the block shapes when it first meets a dtype and keeps the fastest, also on disk."""
    import triton

    configs = [
        triton.Config({"PATCHES": block.patches, "BLOCK_C": block.channels}, num_warps=block.warps)
        for block in blocks(side, channels)
    ]
    return triton.autotune(configs, key=["KERNEL"], cache_results=True)(getattr(_kernels(), name))


def _launch(name: str, grid: Any, side: int, channels: int, *args: Any, **constants: Any) -> None:
    constants |= {"CHANNELS": channels, "SIDE": side}
    if interpreting():
        block = INTERPRETED
        sizes = {"PATCHES": block.patches, "BLOCK_C": block.channels}
        getattr(_kernels(), name)[grid](*args, **constants, **sizes, num_warps=block.warps)
    else:
        with torch.cuda.device(args[0].device):
            _tuned(name, side, channels)[grid](*args, **constants)


@torch.library.custom_op("sparse_ops::triton_depthwise", mutates_args=())
def triton_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, side: int, reverse_taps: bool
) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.depthwise`; ``neighbours`` is the patch table ``[P, (2R + 1)²]``."""
    out = torch.empty_like(x)
    patches, channels, kernel_size = neighbours.shape[0], x.shape[1], weight.shape[-1]
    if not patches or not channels:
        return out
    taps = weight.flatten(1).t().float().contiguous()
    offset = taps if bias is None else bias.float()

    def grid(sizes: dict[str, int]) -> tuple[int, int]:
        return -(-patches // sizes["PATCHES"]), -(-channels // sizes["BLOCK_C"])

    _launch(
        "depthwise_kernel",
        grid,
        side,
        channels,
        x,
        taps,
        offset,
        neighbours,
        out,
        patches,
        KERNEL=kernel_size,
        REACH=reach(kernel_size, side),
        REVERSE=reverse_taps,
        HAS_BIAS=bias is not None,
    )
    return out


@triton_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, side: int, reverse_taps: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("sparse_ops::triton_depthwise_weight_grad", mutates_args=())
def triton_depthwise_weight_grad(x: Tensor, grad: Tensor, neighbours: Tensor, side: int, kernel_size: int) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.depthwise_weight_grad`."""
    patches, channels = neighbours.shape[0], x.shape[1]
    slices = weight_grad_slices(patches, channels, side, kernel_size)
    if not slices:
        return x.new_zeros(channels, 1, kernel_size, kernel_size)
    partial = x.new_empty(slices, kernel_size**2, channels, dtype=torch.float32)

    def grid(sizes: dict[str, int]) -> tuple[int, int, int]:
        return slices, -(-channels // sizes["BLOCK_C"]), kernel_size

    _launch(
        "depthwise_weight_grad_kernel",
        grid,
        side,
        channels,
        x,
        grad,
        neighbours,
        partial,
        patches,
        -(-patches // slices),
        KERNEL=kernel_size,
        REACH=reach(kernel_size, side),
    )
    return partial.sum(0).t().to(x.dtype).reshape(channels, 1, kernel_size, kernel_size)


@triton_depthwise_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, neighbours: Tensor, side: int, kernel_size: int) -> Tensor:
    return x.new_empty(x.shape[1], 1, kernel_size, kernel_size)


def weight_grad_slices(patches: int, channels: int, side: int, kernel_size: int) -> int:
    """Partial sums of the weight gradient; each costs ``K²·C`` numbers, and has 32 patches or 256 cells at least."""
    least = max(1, 256 // side**2) if side > 2 else 32
    wanted = PROGRAMS // (kernel_size * max(1, channels // 64))
    return min(-(-patches // least), max(1, wanted))


class TritonBackend(Backend):
    """Patch-and-halo kernels in Triton for float32, bfloat16 and float16, accumulated in float32."""

    name = "triton"
    priority = -1  # not the choice of "auto" before it has been measured on a GPU

    @property
    def summary(self) -> str:  # type: ignore[override]  # says where it runs
        return "Triton kernels for NVIDIA GPUs" + (" (interpreted, on the CPU)" if interpreting() else "")

    def unavailable_reason(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; it comes with torch for CUDA: pip install torch"
        if interpreting():
            return None
        if not torch.cuda.is_available():
            return "torch finds no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
        if torch.cuda.get_device_capability()[0] < 8:
            return f"it needs a GPU of compute capability 8.0 or newer, not {torch.cuda.get_device_name()}"
        return None

    def rejects(self, device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
        if device.type != ("cpu" if interpreting() else "cuda"):
            return f"it runs on CUDA{', here interpreted on the CPU' if interpreting() else ''}, not on {device}"
        if dtype not in DTYPES:
            return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
        if kernel_size not in KERNEL_SIZES:
            return f"kernel size {kernel_size} is not one of {KERNEL_SIZES}"
        return None

    def prepare(self, active: ActiveSet, kernel_size: int) -> None:
        active.patch_neighbours(kernel_size)

    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, *, reverse_taps: bool
    ) -> Tensor:
        neighbours = active.patch_neighbours(weight.shape[-1])
        return run(triton_depthwise, x, weight, bias, neighbours, active.side, reverse_taps)

    def depthwise_weight_grad(self, x: Tensor, grad: Tensor, active: ActiveSet, kernel_size: int) -> Tensor:
        neighbours = active.patch_neighbours(kernel_size)
        return run(triton_depthwise_weight_grad, x, grad, neighbours, active.side, kernel_size)


BACKEND = TritonBackend()

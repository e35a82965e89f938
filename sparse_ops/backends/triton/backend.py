"""The backend for NVIDIA GPUs: Triton kernels for float32, bfloat16 and float16, with sums in float32.

With ``TRITON_INTERPRET=1`` the same kernels run in Triton's interpreter on tensors in main memory: slow, and meant for
tests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import MLPCall
from sparse_ops.backends._operators import run
from sparse_ops.backends.triton import block
from sparse_ops.backends.triton.depthwise import (
    DTYPES,
    KERNEL_SIZES,
    TILE,
    TILE_OF_ANY,
    tiles_of,
    triton_depthwise,
    triton_depthwise_weight_grad,
)
from sparse_ops.backends.triton.launch import interpreting, only_compiling
from sparse_ops.backends.triton.mlp import triton_mlp
from sparse_ops.backends.triton.mlp_backward import triton_mlp_backward
from sparse_ops.conformance import check_conformance, check_mlp_conformance
from sparse_ops.conformance_block import check_block_conformance
from sparse_ops.conformance_cases import ConformanceCase, MLPCase
from sparse_ops.residual import BlockBackend, BlockCall


def _too_old(device: torch.device) -> str | None:
    """Why the kernels do not run on a CUDA device, or None; also where torch finds none."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] >= 8:
        return None
    return f"it needs a GPU of compute capability 8.0 or newer; {device} is {torch.cuda.get_device_name(device)}"


class TritonBackend(BlockBackend):
    """Kernels in Triton for float32, bfloat16 and float16, with sums in float32: convolution and pointwise half."""

    name = "triton"
    priority = 5
    wide_weights = True

    def __init__(self) -> None:
        self._compiled: set[tuple[int, int, int, torch.device, torch.dtype]] = set()

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
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        return None if any(_too_old(device) is None for device in devices) else _too_old(devices[0])

    def rejects(self, device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
        if device.type != ("cpu" if interpreting() else "cuda"):
            return f"it runs on CUDA{', here interpreted on the CPU' if interpreting() else ''}, not on {device}"
        if device.type == "cuda" and not torch.compiler.is_compiling() and (reason := _too_old(device)):
            return reason
        if dtype not in DTYPES:
            return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
        if kernel_size not in KERNEL_SIZES:
            return f"kernel size {kernel_size} is not one of {KERNEL_SIZES}"
        return None

    def check(self, device: torch.device) -> str | None:
        """A small case of each kernel against the float64 oracle, with and without 16 bits."""
        case, mlp_case = ConformanceCase("check", ("..#/#.#",), channels=16), MLPCase("check", (48, 48), channels=16)
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                for dtype in (torch.float32, torch.bfloat16):
                    check_conformance(self, case, dtype, device)
                    check_mlp_conformance(self, mlp_case, dtype, device)
                    check_block_conformance(self, case, dtype, device)
        except Exception as error:  # whatever Triton raises, it is told and another backend runs
            return f"its kernels fail their check on this device ({type(error).__name__}: {str(error)[:500]})"
        return None

    def warm_up(
        self, stages: Sequence[tuple[int, int]], kernel_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Kernels are compiled side by side: some take seconds, and a network needs about sixty."""
        if interpreting() or device.type == "meta" or self.rejects(device, dtype, kernel_size) is not None:
            return
        missing = {(side, channels, kernel_size, device, dtype) for side, channels in stages} - self._compiled
        if missing:
            with only_compiling(), torch.no_grad(), torch.autocast(device.type, enabled=False):
                for stage in missing:
                    block.compile_stage(self, *stage)
            self._compiled |= missing

    def prepare(self, active: ActiveSet, kernel_size: int) -> None:
        for side in (TILE, TILE_OF_ANY):
            active.tile_neighbours(kernel_size, side)

    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, *, reverse_taps: bool
    ) -> Tensor:
        return run(triton_depthwise, x, weight, bias, *tiles_of(active, weight.shape[-1], x.shape[1]), reverse_taps)

    def depthwise_weight_grad(self, x: Tensor, grad: Tensor, active: ActiveSet, kernel_size: int) -> Tensor:
        return self._grads(x, grad, active, kernel_size, x.dtype)[0]

    def depthwise_grads(self, x: Tensor, grad: Tensor, active: ActiveSet, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self._grads(x, grad, active, weight.shape[-1], weight.dtype)

    def _grads(
        self, x: Tensor, grad: Tensor, active: ActiveSet, kernel_size: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        tiles = tiles_of(active, kernel_size, x.shape[1])
        return run(triton_depthwise_weight_grad, x, grad, *tiles, kernel_size, dtype)

    def fuses_mlp(self, device: torch.device, dtype: torch.dtype, weights_dtype: torch.dtype) -> bool:
        return self.rejects(device, dtype, KERNEL_SIZES[0]) is None and weights_dtype in (dtype, torch.float32)

    def mlp(self, call: MLPCall) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, row_offsets, rows, weights, eps, _ = call
        *kept, out = run(triton_mlp, x, list(weights), row_offsets, rows, *eps, None, x.dtype)
        return out, tuple(kept)

    def mlp_backward(self, grad: Tensor, call: MLPCall, kept: tuple[Tensor, ...]) -> list[Tensor]:
        x, row_offsets, rows, weights, eps, _ = call
        return run(triton_mlp_backward, grad, x, list(weights), row_offsets, rows, list(kept), *eps)

    def fuses_block(self, device: torch.device, dtype: torch.dtype, stream: torch.dtype, weights: torch.dtype) -> bool:
        return self.fuses_mlp(device, dtype, weights) and stream in (dtype, torch.float32)

    def block(self, call: BlockCall) -> tuple[Tensor, tuple[Tensor, ...]]:
        return block.forward(self, call)

    def block_backward(self, grad: Tensor, call: BlockCall, kept: tuple[Tensor, ...]) -> list[Tensor | None]:
        return block.backward(self, grad, call, kept)


BACKEND = TritonBackend()

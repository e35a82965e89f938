"""The compiled CPU backend: C++ kernels that work patch by patch with a halo, vectorised over channels.

The library in ``csrc`` knows neither torch nor Python (it is called through ``ctypes`` with plain pointers), so it
keeps working when either is upgraded. The instruction set is chosen when it is loaded, by what the processor has;
``SPARSE_OPS_CPU=baseline|avx2|avx512`` asks for a lower one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend, MLPCall
from sparse_ops.backends._operators import run
from sparse_ops.backends.cpu import composed, maps
from sparse_ops.backends.cpu.library import DTYPES, load
from sparse_ops.backends.cpu.operators import cpu_depthwise, cpu_depthwise_weight_grad, cpu_mlp, cpu_mlp_backward

KERNEL_SIZES = (3, 5, 7)


class CPUBackend(Backend):
    """Patch-and-halo kernels in C++ for float32, float64 and bfloat16 (accumulated in float32)."""

    name = "cpu"
    priority = 10
    maps = maps.CPUMaps()

    @property
    def summary(self) -> str:  # type: ignore[override]  # says what was found on this machine
        library, _ = load()
        if library is None:
            return "compiled C++ for processors"
        chosen = library.sparse_ops_instruction_set().decode()
        return f"compiled C++ ({chosen}; threads: {library.sparse_ops_threads().decode()})"

    def unavailable_reason(self) -> str | None:
        return load()[1]

    def rejects(self, device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        if dtype not in DTYPES:
            return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
        return None if kernel_size in KERNEL_SIZES else f"kernel size {kernel_size} is not one of {KERNEL_SIZES}"

    def prepare(self, active: ActiveSet, kernel_size: int) -> None:
        active.patch_neighbours(kernel_size)

    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, *, reverse_taps: bool
    ) -> Tensor:
        neighbours = active.patch_neighbours(weight.shape[-1])
        return run(cpu_depthwise, x, weight, bias, neighbours, active.side, reverse_taps)

    def depthwise_weight_grad(self, x: Tensor, grad: Tensor, active: ActiveSet, kernel_size: int) -> Tensor:
        return run(cpu_depthwise_weight_grad, x, grad, active.patch_neighbours(kernel_size), active.side, kernel_size)

    def fuses_mlp(self, device: torch.device, dtype: torch.dtype, weights_dtype: torch.dtype) -> bool:
        return device.type == "cpu" and dtype in (torch.float32, torch.float64) and weights_dtype == dtype

    def mlp(self, call: MLPCall) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not composed.one_kernel(call):
            return composed.forward(call)
        *kept, out = run(cpu_mlp, call.x, list(call.weights), call.row_offsets, *call.eps)
        return out, tuple(kept)

    def mlp_result(self, call: MLPCall, residual: Tensor | None = None) -> Tensor:
        return super().mlp_result(call, residual) if call.rows is not None else maps.mlp_result(call, residual)

    def mlp_backward(self, grad: Tensor, call: MLPCall, kept: tuple[Tensor, ...]) -> list[Tensor]:
        if not composed.one_kernel(call):
            return composed.backward(grad, call, kept)
        return run(cpu_mlp_backward, grad, call.x, list(call.weights), call.row_offsets, list(kept), *call.eps)


BACKEND = CPUBackend()

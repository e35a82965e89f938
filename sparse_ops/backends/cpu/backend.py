"""The compiled CPU backend: C++ kernels that work patch by patch with a halo, vectorised over channels.

The library in ``csrc`` knows neither torch nor Python (it is called through ``ctypes`` with plain pointers), so it
keeps working when either is upgraded. The instruction set is chosen when it is loaded, by what the processor has;
``SPARSE_OPS_CPU=baseline|avx2|avx512`` asks for a lower one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend
from sparse_ops.backends._operators import run
from sparse_ops.backends.cpu.library import DTYPES, _load
from sparse_ops.backends.cpu.operators import (
    cpu_depthwise,
    cpu_depthwise_weight_grad,
    cpu_gelu_grn,
    cpu_gelu_grn_backward,
    cpu_layer_norm_backward,
    cpu_mlp,
    cpu_mlp_backward,
)

KERNEL_SIZES = (3, 5, 7)


#: Up to this width the whole pointwise half of a block is one kernel: its weights stay in a core's own cache.
MLP_MAX_CHANNELS = 192


MLP_CHANNELS_MULTIPLE = 4


class CPUBackend(Backend):
    """Patch-and-halo kernels in C++ for float32, float64 and bfloat16 (accumulated in float32)."""

    name = "cpu"
    priority = 10

    @property
    def summary(self) -> str:  # type: ignore[override]  # says what was found on this machine
        library, _ = _load()
        if library is None:
            return "compiled C++ for processors"
        chosen = library.sparse_ops_instruction_set().decode()
        return f"compiled C++ ({chosen}; threads: {library.sparse_ops_threads().decode()})"

    def unavailable_reason(self) -> str | None:
        return _load()[1]

    def rejects(self, device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
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
        return run(cpu_depthwise, x, weight, bias, neighbours, active.side, reverse_taps)

    def depthwise_weight_grad(self, x: Tensor, grad: Tensor, active: ActiveSet, kernel_size: int) -> Tensor:
        return run(cpu_depthwise_weight_grad, x, grad, active.patch_neighbours(kernel_size), active.side, kernel_size)

    def fuses_mlp(self, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu" and dtype in (torch.float32, torch.float64)

    def gelu_grn(
        self, h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, row_offsets: Tensor, eps: float, out: Tensor
    ) -> Tensor:
        return run(cpu_gelu_grn, h, bias, gamma, beta, row_offsets, eps, out)

    def gelu_grn_backward(
        self,
        grad: Tensor,
        h: Tensor,
        bias: Tensor,
        gamma: Tensor,
        beta: Tensor,
        norms: Tensor,
        row_offsets: Tensor,
        eps: float,
        out: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return run(cpu_gelu_grn_backward, grad, h, bias, gamma, beta, norms, row_offsets, eps, out)

    def layer_norm_backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return run(cpu_layer_norm_backward, grad, x, mean, rstd, weight, bias, out)

    def fuses_whole_mlp(self, channels: int, some_rows: bool) -> bool:
        return not some_rows and channels <= MLP_MAX_CHANNELS and channels % MLP_CHANNELS_MULTIPLE == 0

    def mlp(
        self,
        x: Tensor,
        parameters: tuple[Tensor, ...],
        row_offsets: Tensor,
        rows: Tensor | None,
        norm_eps: float,
        grn_eps: float,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        *kept, out = run(cpu_mlp, x, list(parameters), row_offsets, norm_eps, grn_eps)
        return out, tuple(kept)

    def mlp_backward(
        self,
        grad: Tensor,
        x: Tensor,
        parameters: tuple[Tensor, ...],
        row_offsets: Tensor,
        rows: Tensor | None,
        kept: tuple[Tensor, ...],
        norm_eps: float,
        grn_eps: float,
    ) -> list[Tensor]:
        return run(cpu_mlp_backward, grad, x, list(parameters), row_offsets, list(kept), norm_eps, grn_eps)


BACKEND = CPUBackend()

"""What a dense network needs: depthwise convolutions of whole maps, ``[B, H, W, C]`` in row-major order, and a block's
pointwise half without a backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_ops.backend import MLPCall
from sparse_ops.backends._operators import run
from sparse_ops.backends.cpu import composed
from sparse_ops.backends.cpu.library import call, structure
from sparse_ops.backends.cpu.operators import call_mlp, cpu_gelu_grn
from sparse_ops.map_kernels import MapKernels

SERVED = (torch.float32, torch.bfloat16)

MAP = structure(
    pointers="x other bias out out_bias", sizes="batch height width channels", ints="kernel reverse_taps threads"
)


def _call(function: str, x: Tensor, **fields: Any) -> None:
    sizes = dict(zip(("batch", "height", "width", "channels"), x.shape, strict=True))
    call(function, MAP, x.dtype, x=x, **sizes, **fields)


@torch.library.custom_op("sparse_ops::cpu_depthwise_map", mutates_args=(), device_types="cpu")
def cpu_depthwise_map(x: Tensor, weight: Tensor, bias: Tensor | None, reverse_taps: bool) -> Tensor:
    """See :meth:`sparse_ops.map_kernels.MapKernels.depthwise`."""
    out = torch.empty_like(x)
    fields = {"other": weight, "bias": bias, "out": out, "kernel": weight.shape[-1], "reverse_taps": reverse_taps}
    _call("sparse_ops_depthwise_map", x, **fields)
    return out


cpu_depthwise_map.register_fake(lambda x, *_: torch.empty_like(x))


@torch.library.custom_op("sparse_ops::cpu_depthwise_map_weight_grad", mutates_args=(), device_types="cpu")
def cpu_depthwise_map_weight_grad(x: Tensor, grad: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """See :meth:`sparse_ops.map_kernels.MapKernels.depthwise_weight_grad`."""
    channels = x.shape[-1]
    weight, bias = x.new_empty(channels, 1, kernel_size, kernel_size), x.new_empty(channels)
    fields = {"other": grad, "out": weight, "out_bias": bias, "kernel": kernel_size}
    _call("sparse_ops_depthwise_map_weight_grad", x, **fields)
    return weight, bias


cpu_depthwise_map_weight_grad.register_fake(
    lambda x, grad, kernel: (x.new_empty(x.shape[-1], 1, kernel, kernel), x.new_empty(x.shape[-1]))
)


@torch.library.custom_op("sparse_ops::cpu_mlp_result", mutates_args=("h",), device_types="cpu")
def cpu_mlp_result(
    x: Tensor, parameters: list[Tensor], row_offsets: Tensor, norm_eps: float, grn_eps: float, h: Tensor
) -> Tensor:
    """What :func:`~sparse_ops.backends.cpu.operators.cpu_mlp` returns last; ``h`` ``[N, D]`` is scratch memory."""
    out, mean, rstd = torch.empty_like(x), x.new_empty(x.shape[0]), x.new_empty(x.shape[0])
    norms = x.new_empty(row_offsets.numel() - 1, h.shape[1])
    fields = {"h": h, "mean": mean, "rstd": rstd, "norms": norms, "out": out, "norm_eps": norm_eps, "grn_eps": grn_eps}
    call_mlp("sparse_ops_mlp", x, parameters, row_offsets, **fields)
    return out


cpu_mlp_result.register_fake(lambda x, *_: torch.empty_like(x))


class CPUMaps(MapKernels):
    """Kernels of 7 × 7 taps, in float32 and, for the convolution in evaluation, bfloat16."""

    def rejects(self, device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
        if device.type != "cpu":
            return f"the kernels run on the CPU, not on {device}"
        if dtype not in SERVED:
            return f"dtype {dtype} is not one of {', '.join(map(str, SERVED))}"
        return None if kernel_size == 7 else f"kernel size {kernel_size} is not 7"

    def depthwise(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, reverse_taps: bool) -> Tensor:
        return run(cpu_depthwise_map, x, weight, bias, reverse_taps)

    def depthwise_weight_grad(self, x: Tensor, grad: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
        return run(cpu_depthwise_map_weight_grad, x, grad, kernel_size)


def mlp_result(call: MLPCall) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.mlp_result`; the hidden layer lives in the workspace."""
    x, row_offsets, _, weights, eps, workspace = call
    h = workspace.take("h", (x.shape[0], weights.w1.shape[0]), x)
    if composed.one_kernel(call):
        return run(cpu_mlp_result, x, list(weights), row_offsets, *eps, h)
    torch.mm(F.layer_norm(x, x.shape[1:], weights.norm_weight, weights.norm_bias, eps[0]), weights.w1.t(), out=h)
    y = workspace.take("y", h.shape, h)
    run(cpu_gelu_grn, h, weights.b1, weights.gamma, weights.beta, row_offsets, eps[1], y)
    return torch.addmm(weights.b2, y, weights.w2.t())

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
HIDDEN_BYTES = 4 << 20
"""Of the hidden layer that is computed at a time where it is not kept: it stays in the last cache."""

MAP = structure(  # MapArgs of csrc/depthwise_map.inc
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


@torch.library.custom_op("sparse_ops::cpu_mlp_result", mutates_args=("h", "out"), device_types="cpu")
def cpu_mlp_result(
    x: Tensor, parameters: list[Tensor], row_offsets: Tensor, norm_eps: float, grn_eps: float, h: Tensor, out: Tensor
) -> None:
    """The last result of :func:`~sparse_ops.backends.cpu.operators.cpu_mlp` into ``out`` ``[N, C]``; ``h`` ``[N, D]``
    is scratch memory."""
    mean, rstd, norms = (
        x.new_empty(x.shape[0]),
        x.new_empty(x.shape[0]),
        x.new_empty(row_offsets.numel() - 1, h.shape[1]),
    )
    fields = {"h": h, "mean": mean, "rstd": rstd, "norms": norms, "out": out, "norm_eps": norm_eps, "grn_eps": grn_eps}
    call_mlp("sparse_ops_mlp", x, parameters, row_offsets, **fields, result_only=1)


cpu_mlp_result.register_fake(lambda *_: None)


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
    """See :meth:`sparse_ops.backend.Backend.mlp_result`; the workspace holds the hidden layer of a few images."""
    offsets, hidden = call.row_offsets.tolist(), call.weights.w1.shape[0]
    out, step = torch.empty_like(call.x), 1
    if offsets[-1] > 0:
        step = max(1, HIDDEN_BYTES * (len(offsets) - 1) // (offsets[-1] * hidden * call.x.element_size()))
    for first in range(0, len(offsets) - 1, step):
        last = min(first + step, len(offsets) - 1)
        rows = slice(offsets[first], offsets[last])
        own = call.row_offsets[first : last + 1] - offsets[first]
        _result_into(out[rows], call._replace(x=call.x[rows], row_offsets=own))
    return out


def _result_into(out: Tensor, call: MLPCall) -> None:
    x, row_offsets, _, weights, eps, workspace = call
    h = workspace.take("h", (x.shape[0], weights.w1.shape[0]), x)
    if composed.one_kernel(call):
        run(cpu_mlp_result, x, list(weights), row_offsets, *eps, h, out)
        return
    torch.mm(F.layer_norm(x, x.shape[1:], weights.norm_weight, weights.norm_bias, eps[0]), weights.w1.t(), out=h)
    y = workspace.take("y", h.shape, h)
    run(cpu_gelu_grn, h, weights.b1, weights.gamma, weights.beta, row_offsets, eps[1], y)
    torch.addmm(weights.b2, y, weights.w2.t(), out=out)

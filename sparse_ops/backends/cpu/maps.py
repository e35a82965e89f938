"""What a dense network needs: depthwise convolutions of whole maps, ``[B, H, W, C]`` in row-major order, and a block's
pointwise half without a backward pass."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparse_ops.backend import MLPCall
from sparse_ops.backends._operators import run
from sparse_ops.backends.cpu.library import MLP_PARAMETERS, call, structure
from sparse_ops.map_kernels import MapKernels

SERVED = (torch.float32, torch.bfloat16)
HIDDEN_BYTES = 4 << 20
"""Of the hidden layer that is computed at a time where it is not kept: it stays in the last cache."""

BLOCK_ROWS = 48
"""Rows of a block with the widest vectors: three of 16."""

MAP = structure(  # MapArgs of csrc/depthwise_map.inc
    pointers="x other bias out out_bias", sizes="batch height width channels", ints="kernel reverse_taps threads"
)

MLP_RESULT = structure(  # MlpResultArgs of csrc/mlp_result.inc
    pointers=" ".join(["x residual", *MLP_PARAMETERS, "offsets h out"]),
    doubles="norm_eps grn_eps",
    sizes="groups channels dim scratch",
    ints="threads",
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
    x: Tensor,
    residual: Tensor | None,
    parameters: list[Tensor],
    row_offsets: Tensor,
    norm_eps: float,
    grn_eps: float,
    h: Tensor,
) -> Tensor:
    """The last result of :func:`~sparse_ops.backends.cpu.operators.cpu_mlp`, plus ``residual`` ``[N, C]`` if there is
    one; ``h`` ``[rows, D]`` is scratch memory, for the longest group or more, a multiple of :data:`BLOCK_ROWS`."""
    out = torch.empty_like(x)
    sizes = {"groups": row_offsets.numel() - 1, "channels": x.shape[1], "dim": h.shape[1], "scratch": h.shape[0]}
    eps = {"norm_eps": norm_eps, "grn_eps": grn_eps}
    tensors = {"x": x, "residual": residual, "offsets": row_offsets, "h": h, "out": out}
    tensors |= zip(MLP_PARAMETERS, parameters, strict=True)
    call("sparse_ops_mlp_result", MLP_RESULT, x.dtype, **tensors, **sizes, **eps)
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


def mlp_result(call: MLPCall, residual: Tensor | None) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.mlp_result`; the workspace holds the hidden layer of a few images."""
    x, row_offsets, _, weights, eps, workspace = call
    lengths, hidden = [end - begin for begin, end in pairwise(row_offsets.tolist())], weights.w1.shape[0]
    longest = -(-max(lengths, default=0) // BLOCK_ROWS) * BLOCK_ROWS
    rows = max(longest, min(HIDDEN_BYTES // (hidden * x.element_size()), longest * len(lengths)))
    h = workspace.take("h", (rows, hidden), x)
    return run(cpu_mlp_result, x, residual, list(weights), row_offsets, *eps, h)

"""A whole block: the operators in their order, with what they can take over from each other.

The residual is what the projection adds its product to, and the gradient of the result is what the convolution's
gradient for its input is added to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ops.active_set import ActiveSet
from sparse_ops.backends._operators import run
from sparse_ops.backends.triton.depthwise import tiles_of, triton_depthwise, triton_depthwise_weight_grad
from sparse_ops.backends.triton.mlp import triton_mlp
from sparse_ops.backends.triton.mlp_backward import triton_mlp_backward
from sparse_ops.pointwise import MLPWeights
from sparse_ops.residual import BlockBackend, BlockCall

FIRST_SIDE = 8
"""Cells a patch side of the first stage, whose blocks add up in float32 under autocast as the LayerNorm before does."""


def forward(backend: BlockBackend, call: BlockCall) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See :meth:`sparse_ops.residual.BlockBackend.block`. The convolution reads x as it comes and keeps its dtype."""
    x, weight, bias, active, row_offsets, weights, eps, dtype = call
    h = backend.depthwise(x, weight, bias, active, reverse_taps=False)
    *kept, out = run(triton_mlp, h, list(weights), row_offsets, None, *eps, x, dtype)
    return out, (h, *kept)


def backward(backend: BlockBackend, grad: Tensor, call: BlockCall, kept: tuple[Tensor, ...]) -> list[Tensor | None]:
    """See :meth:`sparse_ops.residual.BlockBackend.block_backward`."""
    x, weight, bias, active, row_offsets, weights, eps, _ = call
    h, *of_mlp = kept
    given = grad, h, list(weights), row_offsets, None, of_mlp
    grad_h, *grads = run(triton_mlp_backward, *given, *eps)
    tiles = tiles_of(active, weight.shape[-1], x.shape[1])
    grad_x = run(triton_depthwise, grad_h, weight, None, *tiles, True, grad)  # in the dtype of grad
    grad_weight, grad_bias = run(triton_depthwise_weight_grad, x, grad_h, *tiles, weight.shape[-1], weight.dtype)
    return [grad_x, grad_weight, None if bias is None else grad_bias.to(bias.dtype), *grads]


def compile_stage(
    backend: BlockBackend, side: int, channels: int, kernel_size: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Where launches only compile: everything that a block of such a stage launches; parameters are float32."""
    active = ActiveSet.full(1, (1, 1), side, device=device)
    shapes = [(channels, 1, kernel_size, kernel_size), (channels,), *MLPWeights.shapes(channels, 4 * channels)]
    weight, bias, *rest = (torch.empty(shape, device=device) for shape in shapes)
    for stream in {dtype, torch.float32} if side == FIRST_SIDE else {dtype}:
        x = torch.empty(active.num_cells, channels, device=device, dtype=stream)
        call = BlockCall(x, weight, bias, active, active.row_offsets, MLPWeights(*rest), (1e-6, 1e-6), dtype)
        out, kept = forward(backend, call)
        backward(backend, out, call, kept)

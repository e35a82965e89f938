"""The pointwise half of a block of any width: torch's matrix products, the library's GELU with GRN, and LayerNorm.

Kept for the backward pass are the input and the hidden layer before GELU; the rest is computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ops.backend import MLPCall
from sparse_ops.backends._operators import run
from sparse_ops.backends.cpu.operators import cpu_gelu_grn, cpu_gelu_grn_backward, cpu_layer_norm_backward

#: Up to this width the whole pointwise half of a block is one kernel: its weights stay in a core's own cache.
MLP_MAX_CHANNELS = 192
MLP_CHANNELS_MULTIPLE = 4
MLP_HIDDEN_MULTIPLE = 16  # the widest vector


def one_kernel(call: MLPCall) -> bool:
    """Whether the whole pointwise half is one kernel; else it is composed of several and of torch's products."""
    channels, hidden = call.x.shape[1], call.weights.w1.shape[0]
    whole = channels % MLP_CHANNELS_MULTIPLE == 0 and hidden % MLP_HIDDEN_MULTIPLE == 0
    return call.rows is None and channels <= MLP_MAX_CHANNELS and whole


def forward(call: MLPCall) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See :meth:`sparse_ops.backend.Backend.mlp`."""
    x, row_offsets, rows, (norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2), eps, workspace = call
    normed, mean, rstd = torch.native_layer_norm(x, [x.shape[1]], norm_weight, norm_bias, eps[0])
    h = normed @ w1.t()
    y = workspace.take("y", h.shape, h)
    norms = run(cpu_gelu_grn, h, b1, gamma, beta, row_offsets, eps[1], y)
    if rows is not None:
        y = torch.index_select(y, 0, rows, out=workspace.take("rows", (rows.numel(), y.shape[1]), y))
    return torch.addmm(b2, y, w2.t()), (h, mean, rstd, norms)


def backward(grad: Tensor, call: MLPCall, kept: tuple[Tensor, ...]) -> list[Tensor]:
    """See :meth:`sparse_ops.backend.Backend.mlp_backward`."""
    x, row_offsets, rows, (norm_weight, norm_bias, w1, b1, gamma, beta, w2, _), eps, workspace = call
    h, mean, rstd, norms = kept
    grad_h, y = (workspace.take(slot, h.shape, h) for slot in ("grad", "y"))
    if rows is None:
        torch.mm(grad, w2, out=grad_h)
    else:
        some = workspace.take("rows", (rows.numel(), h.shape[1]), h)
        grad_h.zero_().index_copy_(0, rows, torch.mm(grad, w2, out=some))
    grad_gamma, grad_beta, grad_b1 = run(
        cpu_gelu_grn_backward, grad_h, h, b1, gamma, beta, norms, row_offsets, eps[1], y
    )
    grad_w2, grad_b2 = grad.t() @ (y if rows is None else torch.index_select(y, 0, rows, out=some)), grad.sum(0)
    normed, grad_normed = (workspace.take(slot, x.shape, x) for slot in ("normed", "grad_normed"))
    torch.mm(grad_h, w1, out=grad_normed)
    grad_x, grad_norm_weight, grad_norm_bias = run(
        cpu_layer_norm_backward, grad_normed, x, mean, rstd, norm_weight, norm_bias, normed
    )
    grad_w1 = grad_h.t() @ normed
    return [grad_x, grad_norm_weight, grad_norm_bias, grad_w1, grad_b1, grad_gamma, grad_beta, grad_w2, grad_b2]

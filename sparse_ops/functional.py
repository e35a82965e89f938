"""Differentiable sparse operations: argument checks, dispatch to a backend, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend
from sparse_ops.pointwise import autocast_dtype
from sparse_ops.workspace import Workspace


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, backend: Backend
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.active, ctx.backend = active, backend
        return backend.depthwise(x, weight, bias, active, reverse_taps=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.backend.depthwise(grad, weight, None, ctx.active, reverse_taps=True)
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.backend.depthwise_weight_grad(x, grad, ctx.active, weight.shape[-1])
        if ctx.needs_input_grad[2]:
            wide = torch.float32 if grad.dtype in (torch.bfloat16, torch.float16) else grad.dtype
            grad_bias = grad.sum(0, dtype=wide).to(grad.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, backend: Backend) -> Tensor:
    """Depthwise convolution, stride 1 and "same" padding, over the active cells only.

    Equal to a dense convolution of the map in which every masked cell is zero, read at the active cells.
    Under autocast the operands are cast to the autocast dtype, as for a dense convolution.

    Args:
        x: ``[N, C]``, rows in the order of ``active``.
        weight: ``[C, 1, K, K]`` with odd K, in the layout of ``torch.nn.Conv2d(groups=C)``.
        bias: ``[C]`` or None.
        active: the active set.
        backend: a backend, see :func:`sparse_ops.registry.resolve_backend`.

    Returns:
        ``[N, C]``.

    Raises:
        ValueError: if shapes or devices do not fit, or the backend does not serve such inputs.
        TypeError: if the dtypes differ.
    """
    active.check_rows(x)
    channels = x.shape[1]
    if weight.dim() != 4 or weight.shape[:2] != (channels, 1) or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"expected a depthwise weight [{channels}, 1, K, K] for {channels} channels, got {tuple(weight.shape)}"
        )
    if weight.shape[2] % 2 == 0:
        raise ValueError(f"kernel size must be odd, got {weight.shape[2]}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"expected a bias [{channels}], got {tuple(bias.shape)}")
    if active.device != x.device:
        raise ValueError(f"x is on {x.device} but the active set is on {active.device}")
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is None:
            continue
        if operand.dtype != x.dtype:
            raise TypeError(f"x is {x.dtype} but {name} is {operand.dtype}; cast one of them")
        if operand.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {operand.device}")
    reason = backend.rejects(x.device, x.dtype, weight.shape[-1])
    if reason is not None:
        raise ValueError(f"backend {backend.name!r} does not serve this input: {reason}; try backend='reference'")
    bias = None if bias is None else bias.contiguous()
    backend.prepare(active, weight.shape[-1])
    return _DepthwiseConv.apply(x.contiguous(), weight.contiguous(), bias, active, backend)


class _ConvNeXtMLP(torch.autograd.Function):
    """LayerNorm, expansion, GELU, GRN and projection, keeping only the input and the hidden layer before GELU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        w1: Tensor,
        b1: Tensor,
        gamma: Tensor,
        beta: Tensor,
        w2: Tensor,
        b2: Tensor,
        row_offsets: Tensor,
        rows: Tensor | None,
        norm_eps: float,
        grn_eps: float,
        backend: Backend,
        workspace: Workspace,
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, [x.shape[1]], norm_weight, norm_bias, norm_eps)
        h = normed @ w1.t()
        y = workspace.take("y", h.shape, h)
        norms = backend.gelu_grn(h, b1, gamma, beta, row_offsets, grn_eps, y)
        ctx.save_for_backward(
            x, mean, rstd, norm_weight, norm_bias, w1, b1, h, gamma, beta, norms, w2, row_offsets, rows
        )
        ctx.eps, ctx.backend, ctx.workspace = grn_eps, backend, workspace
        return torch.addmm(b2, y if rows is None else y[rows], w2.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, norm_weight, norm_bias, w1, b1, h, gamma, beta, norms, w2, row_offsets, rows = ctx.saved_tensors
        grad = grad.contiguous()
        grad_h, y = (ctx.workspace.take(slot, h.shape, h) for slot in ("grad", "y"))
        if rows is None:
            torch.mm(grad, w2, out=grad_h)
        else:
            grad_h.zero_().index_copy_(0, rows, grad @ w2)
        grad_gamma, grad_beta, grad_b1 = ctx.backend.gelu_grn_backward(
            grad_h, h, b1, gamma, beta, norms, row_offsets, ctx.eps, y
        )
        grad_w2, grad_b2 = grad.t() @ (y if rows is None else y[rows]), grad.sum(0)
        normed, grad_normed = (ctx.workspace.take(slot, x.shape, x) for slot in ("normed", "grad_normed"))
        torch.mm(grad_h, w1, out=grad_normed)
        grad_x, grad_norm_weight, grad_norm_bias = ctx.backend.layer_norm_backward(
            grad_normed, x, mean, rstd, norm_weight, norm_bias, normed
        )
        grad_w1 = grad_h.t() @ normed
        return (
            grad_x,
            grad_norm_weight,
            grad_norm_bias,
            grad_w1,
            grad_b1,
            grad_gamma,
            grad_beta,
            grad_w2,
            grad_b2,
            None,
            None,
            None,
            None,
            None,
            None,
        )


class _WholeMLP(torch.autograd.Function):
    """The same as one call of the backend each way, where it takes the width."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row_offsets: Tensor,
        rows: Tensor | None,
        norm_eps: float,
        grn_eps: float,
        backend: Backend,
        *parameters: Tensor,
    ) -> Tensor:
        out, kept = backend.mlp(x, parameters, row_offsets, rows, norm_eps, grn_eps)
        ctx.save_for_backward(x, row_offsets, rows, *parameters, *kept)
        ctx.eps, ctx.backend, ctx.parameters = (norm_eps, grn_eps), backend, len(parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, row_offsets, rows, *rest = ctx.saved_tensors
        parameters, kept = tuple(rest[: ctx.parameters]), tuple(rest[ctx.parameters :])
        grad_x, *grads = ctx.backend.mlp_backward(grad.contiguous(), x, parameters, row_offsets, rows, kept, *ctx.eps)
        return grad_x, None, None, None, None, None, *grads


def convnext_mlp(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    pwconv1: tuple[Tensor, Tensor],
    grn: tuple[Tensor, Tensor],
    pwconv2: tuple[Tensor, Tensor],
    row_offsets: Tensor,
    backend: Backend,
    *,
    norm_eps: float,
    grn_eps: float,
    rows: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """The pointwise half of a ConvNeXt V2 block, fused: ``pwconv2(grn(gelu(pwconv1(layer_norm(x)))))``.

    Keeps ``x`` and the hidden layer for the backward pass and recomputes the rest: 5·C numbers a cell instead of
    about 19·C. Only for backends whose :meth:`~sparse_ops.backend.Backend.fuses_mlp` says so. Parameters have the dtype
    of ``x``, or are wider where the backend ``mixes_dtypes``: then matrix products run in the dtype of ``x``.

    Args:
        x: ``[N, C]``, contiguous.
        norm: weight and bias ``[C]`` of the LayerNorm.
        pwconv1: weight ``[D, C]`` and bias ``[D]``.
        grn: gamma and beta, ``[D]``.
        pwconv2: weight ``[C, D]`` and bias ``[C]``.
        row_offsets: ``[G + 1]`` int64 on the device of ``x``: GRN norms are taken over the rows of each group.
        backend: the backend that fuses GELU and GRN.
        norm_eps, grn_eps: added to the variance, and to the mean of the norms.
        rows: ``[M]`` int64, distinct: the rows of the output to compute; all of them if None.
        workspace: memory for temporaries; fresh if None.
    """
    if backend.fuses_whole_mlp(x.shape[1], rows is not None):
        parameters = (parameter.contiguous() for parameter in (*norm, *pwconv1, *grn, *pwconv2))
        return _WholeMLP.apply(x, row_offsets, rows, norm_eps, grn_eps, backend, *parameters)
    workspace = Workspace() if workspace is None else workspace
    return _ConvNeXtMLP.apply(
        x, *norm, *pwconv1, *grn, *pwconv2, row_offsets, rows, norm_eps, grn_eps, backend, workspace
    )

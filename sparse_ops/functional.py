"""Differentiable sparse operations: argument checks, dispatch to a backend, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend, MLPCall
from sparse_ops.checks import check_mlp
from sparse_ops.pointwise import MLPWeights, autocast_dtype, wide_dtype
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
            grad_weight, grad_bias = ctx.backend.depthwise_grads(x, grad, ctx.active, weight)
        if not ctx.needs_input_grad[2]:
            grad_bias = None
        elif grad_bias is None:
            grad_bias = grad.sum(0, dtype=wide_dtype(grad.dtype)).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, backend: Backend) -> Tensor:
    """Depthwise convolution, stride 1 and "same" padding, over the active cells only: ``[N, C]``.

    Equal to a dense convolution of the map in which every masked cell is zero, read at the active cells.
    Under autocast the operands are cast to the autocast dtype, as for a dense convolution; weight and bias stay in
    float32 where the backend takes them so.

    Args:
        x: ``[N, C]``, rows in the order of ``active``.
        weight: ``[C, 1, K, K]`` with odd K, in the layout of ``torch.nn.Conv2d(groups=C)``.
        bias: ``[C]`` or None.
        active: the active set.
        backend: a backend, see :func:`sparse_ops.registry.resolve_backend`.

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
    dtype, expected = autocast_dtype(x.device), x.dtype
    if dtype is not None:
        expected = torch.float32 if backend.wide_weights and weight.dtype == torch.float32 else dtype
        x, weight = x.to(dtype), weight.to(expected)
        bias = None if bias is None else bias.to(expected)
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is None:
            continue
        if operand.dtype != expected:
            raise TypeError(f"x is {x.dtype} but {name} is {operand.dtype}; cast one of them")
        if operand.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {operand.device}")
    reason = backend.rejects(x.device, x.dtype, weight.shape[-1])
    if reason is not None:
        raise ValueError(f"backend {backend.name!r} does not serve this input: {reason}; try backend='reference'")
    bias = None if bias is None else bias.contiguous()
    backend.prepare(active, weight.shape[-1])
    return _DepthwiseConv.apply(x.contiguous(), weight.contiguous(), bias, active, backend)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Backend, eps: tuple[float, float], workspace: Workspace, *tensors: Any) -> Tensor:
        x, row_offsets, rows, *weights = tensors
        out, kept = backend.mlp(MLPCall(x, row_offsets, rows, MLPWeights(*weights), eps, workspace))
        ctx.save_for_backward(*tensors, *kept)
        ctx.backend, ctx.eps, ctx.workspace = backend, eps, workspace
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, row_offsets, rows, *rest = ctx.saved_tensors
        call = MLPCall(x, row_offsets, rows, MLPWeights(*rest[:8]), ctx.eps, ctx.workspace)
        grad_x, *grads = ctx.backend.mlp_backward(grad.contiguous(), call, tuple(rest[8:]))
        return None, None, None, grad_x, None, None, *grads


def convnext_mlp(
    x: Tensor,
    weights: MLPWeights,
    row_offsets: Tensor,
    backend: Backend,
    *,
    eps: tuple[float, float] = (1e-6, 1e-6),
    rows: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """The pointwise half of a ConvNeXt V2 block, fused: ``pwconv2(grn(gelu(pwconv1(layer_norm(x)))))``.

    Keeps ``x`` and the hidden layer for the backward pass and recomputes the rest: 5·C numbers a cell instead of
    about 19·C. Only for backends whose :meth:`~sparse_ops.backend.Backend.fuses_mlp` says so. Raises ValueError if
    shapes, dtypes or devices do not fit.

    Args:
        x: ``[N, C]``.
        weights: in the dtype of ``x``, or wider where the backend takes that: products run in the dtype of ``x``.
        row_offsets: ``[G + 1]`` int64 on the device of ``x``: GRN norms are taken over the rows of each group.
        backend: the backend that fuses it.
        eps: added to the variance of the LayerNorm, and to the mean of GRN's norms.
        rows: ``[M]`` int64, distinct: the rows of the output to compute, ``[M, C]``; all of them if None, ``[N, C]``.
        workspace: memory for temporaries; fresh if None.
    """
    check_mlp(x, weights, row_offsets, backend)
    return _MLP.apply(
        backend,
        eps,
        Workspace() if workspace is None else workspace,
        *(None if tensor is None else tensor.contiguous() for tensor in (x, row_offsets, rows, *weights)),
    )

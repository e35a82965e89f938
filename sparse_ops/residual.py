"""A whole block as one autograd function, for backends that fuse it: its input comes in once, and so does its gradient.

A residual branch written as separate functions costs additions of its own: of the branch to the input, of the two
gradients of the input to each other, and sums over rows of what another kernel has just written.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend
from sparse_ops.checks import keeps_size
from sparse_ops.grid import MLP, GRNScope
from sparse_ops.layers import conv_weights, has_hooks, mlp_weights
from sparse_ops.pointwise import MLPWeights, autocast_dtype


class BlockCall(NamedTuple):
    """The arguments of :func:`convnext_block`, contiguous."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    active: ActiveSet
    row_offsets: Tensor
    weights: MLPWeights
    eps: tuple[float, float]
    dtype: torch.dtype


class BlockBackend(Backend):
    """A backend that computes whole blocks, the residual included."""

    @abstractmethod
    def fuses_block(self, device: torch.device, dtype: torch.dtype, stream: torch.dtype, weights: torch.dtype) -> bool:
        """Whether blocks are served that are computed in ``dtype``, with input and result in ``stream``."""

    @abstractmethod
    def block(self, call: BlockCall) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result, ``[N, C]`` in the dtype of x, and the tensors that :meth:`block_backward` needs."""

    @abstractmethod
    def block_backward(self, grad: Tensor, call: BlockCall, kept: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Gradients for x, weight, bias (None without one) and the eight weights."""


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: BlockBackend,
        active: ActiveSet,
        eps: tuple[float, float],
        dtype: torch.dtype,
        row_offsets: Tensor,
        *tensors: Any,
    ) -> Tensor:
        x, weight, bias, *weights = tensors
        out, kept = backend.block(BlockCall(x, weight, bias, active, row_offsets, MLPWeights(*weights), eps, dtype))
        ctx.save_for_backward(row_offsets, *tensors, *kept)
        ctx.backend, ctx.active, ctx.eps, ctx.dtype = backend, active, eps, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        row_offsets, x, weight, bias, *rest = ctx.saved_tensors
        weights = MLPWeights(*rest[:8])
        call = BlockCall(x, weight, bias, ctx.active, row_offsets, weights, ctx.eps, ctx.dtype)
        grads = ctx.backend.block_backward(grad.contiguous(), call, tuple(rest[8:]))
        return None, None, None, None, None, *grads


def convnext_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: MLPWeights,
    active: ActiveSet,
    row_offsets: Tensor,
    backend: BlockBackend,
    *,
    dtype: torch.dtype,
    eps: tuple[float, float] = (1e-6, 1e-6),
) -> Tensor:
    """A ConvNeXt V2 block, ``x + mlp(depthwise_conv(x))``, computed in ``dtype`` and added up in the dtype of ``x``.

    Only for backends whose :meth:`BlockBackend.fuses_block` says so. Parameters are taken as they are:
    those that are float32 while ``dtype`` has 16 bits get gradients that were float32 all along.

    Args:
        x: ``[N, C]``, rows in the order of ``active``.
        weight: of the depthwise convolution, ``[C, 1, K, K]``.
        bias: ``[C]`` or None.
        weights: of the pointwise half, for the same C.
        active: the active set.
        row_offsets: ``[G + 1]`` int64: GRN norms are taken over the rows of each group.
        backend: the backend that fuses it.
        dtype: of the products and of what is kept between them.
        eps: added to the variance of the LayerNorm, and to the mean of GRN's norms.

    Returns:
        ``[N, C]`` in the dtype of ``x``.

    Raises:
        ValueError: if shapes do not fit.
    """
    active.check_rows(x)
    channels, hidden = x.shape[1], weights.w1.shape[0]
    expected = MLPWeights.shapes(channels, hidden)
    found = [tuple(tensor.shape) for tensor in weights]
    if found != expected or weight.shape[:2] != (channels, 1) or (bias is not None and bias.shape != (channels,)):
        raise ValueError(
            f"expected weights of a block of {channels} channels, [{channels}, 1, K, K], [{channels}] and {expected}, "
            f"got {tuple(weight.shape)}, {None if bias is None else tuple(bias.shape)} and {found}"
        )
    backend.prepare(active, weight.shape[-1])
    tensors = (x, weight, bias, *weights)
    contiguous = (None if tensor is None else tensor.contiguous() for tensor in tensors)
    return _Block.apply(backend, active, eps, dtype, row_offsets.contiguous(), *contiguous)


def groups_of(active: ActiveSet, scope: GRNScope) -> Tensor:
    """``[G + 1]``: where the rows begin over which GRN takes its norms, and where the last end."""
    offsets = active.row_offsets
    return offsets if scope == "image" else offsets[:: offsets.numel() - 1].contiguous()


def fused_block(
    x: Tensor, dwconv: nn.Conv2d, mlp: MLP, drop_path: Any, active: ActiveSet, scope: GRNScope, backend: Backend
) -> Tensor | None:
    """The block of these layers, or None where they do more than a backend fuses, or the backend fuses no block.

    Hooks are called where the layers are computed one by one, and dropping is per image.
    """
    if not isinstance(backend, BlockBackend):
        return None
    (weight, bias), weights, cast = conv_weights(dwconv, keeps_size), mlp_weights(mlp), autocast_dtype(x.device)
    dtype = cast or x.dtype
    if weights is None or not drop_path.idle or has_hooks(drop_path) or has_hooks(dwconv):
        return None
    kinds = {weight.dtype, *(tensor.dtype for tensor in weights)} | (set() if bias is None else {bias.dtype})
    if len(kinds) > 1 or weight.device != x.device or (cast is None and weight.dtype != x.dtype):
        return None
    if not backend.fuses_block(x.device, dtype, x.dtype, weight.dtype):
        return None
    eps, groups = (mlp.norm.eps, mlp.grn.eps), groups_of(active, scope)
    return convnext_block(x, weight, bias, weights, active, groups, backend, dtype=dtype, eps=eps)

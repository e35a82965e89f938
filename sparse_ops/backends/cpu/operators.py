"""The kernels as operators of torch, with the shapes of their results for its compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ops.backends.cpu.library import (
    _MLP_OUTPUTS,
    _MLP_PARAMETERS,
    _call,
    _DepthwiseArgs,
    _GeluGrnArgs,
    _LayerNormArgs,
    _MLPArgs,
    _pointer,
)


@torch.library.custom_op("sparse_ops::cpu_depthwise", mutates_args=(), device_types="cpu")
def cpu_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, side: int, reverse_taps: bool
) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.depthwise`; ``neighbours`` is the patch table ``[P, (2R + 1)²]``."""
    out = torch.empty_like(x)
    args = _DepthwiseArgs(
        x=_pointer(x),
        other=_pointer(weight),
        bias=_pointer(bias),
        neighbours=_pointer(neighbours),
        out=_pointer(out),
        patches=neighbours.shape[0],
        channels=x.shape[1],
        side=side,
        kernel=weight.shape[-1],
        reverse_taps=reverse_taps,
        threads=torch.get_num_threads(),
    )
    _call("sparse_ops_depthwise", args, x.dtype)
    return out


@cpu_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, side: int, reverse_taps: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("sparse_ops::cpu_depthwise_weight_grad", mutates_args=(), device_types="cpu")
def cpu_depthwise_weight_grad(x: Tensor, grad: Tensor, neighbours: Tensor, side: int, kernel_size: int) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.depthwise_weight_grad`."""
    out = x.new_empty(x.shape[1], 1, kernel_size, kernel_size)
    args = _DepthwiseArgs(
        x=_pointer(x),
        other=_pointer(grad),
        neighbours=_pointer(neighbours),
        out=_pointer(out),
        patches=neighbours.shape[0],
        channels=x.shape[1],
        side=side,
        kernel=kernel_size,
        threads=torch.get_num_threads(),
    )
    _call("sparse_ops_depthwise_weight_grad", args, x.dtype)
    return out


@cpu_depthwise_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, neighbours: Tensor, side: int, kernel_size: int) -> Tensor:
    return x.new_empty(x.shape[1], 1, kernel_size, kernel_size)


@torch.library.custom_op("sparse_ops::cpu_gelu_grn", mutates_args=("out",), device_types="cpu")
def cpu_gelu_grn(
    h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, row_offsets: Tensor, eps: float, out: Tensor
) -> Tensor:
    """GRN of the GELU of ``h + bias`` into ``out``, both ``[N, D]`` (ConvNeXt V2, eq. 1-3).

    bias, gamma, beta are ``[D]``; norms are taken over the rows of each group of ``row_offsets`` ``[G + 1]`` int64.

    Returns:
        The channel norms ``[G, D]``.
    """
    groups = row_offsets.numel() - 1
    norms = h.new_empty(groups, h.shape[1])
    args = _GeluGrnArgs(
        h=_pointer(h),
        bias=_pointer(bias),
        gamma=_pointer(gamma),
        beta=_pointer(beta),
        offsets=_pointer(row_offsets),
        norms=_pointer(norms),
        y=_pointer(out),
        eps=eps,
        groups=groups,
        dim=h.shape[1],
        threads=torch.get_num_threads(),
    )
    _call("sparse_ops_gelu_grn", args, h.dtype)
    return norms


@cpu_gelu_grn.register_fake
def _(h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, row_offsets: Tensor, eps: float, out: Tensor) -> Tensor:
    return h.new_empty(row_offsets.numel() - 1, h.shape[1])


@torch.library.custom_op("sparse_ops::cpu_gelu_grn_backward", mutates_args=("grad", "out"), device_types="cpu")
def cpu_gelu_grn_backward(
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
    """Backward of :func:`cpu_gelu_grn`; ``grad`` ``[N, D]`` becomes the gradient for ``h``, ``out`` the output.

    Returns:
        ``(grad_gamma, grad_beta, gradient for h summed over the rows)``, each ``[D]``.
    """
    grad_gamma, grad_beta, grad_bias = torch.empty_like(gamma), torch.empty_like(beta), torch.empty_like(beta)
    args = _GeluGrnArgs(
        h=_pointer(h),
        bias=_pointer(bias),
        gamma=_pointer(gamma),
        beta=_pointer(beta),
        offsets=_pointer(row_offsets),
        norms=_pointer(norms),
        y=_pointer(out),
        grad=_pointer(grad),
        grad_gamma=_pointer(grad_gamma),
        grad_beta=_pointer(grad_beta),
        grad_bias=_pointer(grad_bias),
        eps=eps,
        groups=row_offsets.numel() - 1,
        dim=h.shape[1],
        threads=torch.get_num_threads(),
    )
    _call("sparse_ops_gelu_grn_backward", args, h.dtype)
    return grad_gamma, grad_beta, grad_bias


@cpu_gelu_grn_backward.register_fake
def _(
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
    return torch.empty_like(gamma), torch.empty_like(beta), torch.empty_like(beta)


@torch.library.custom_op("sparse_ops::cpu_layer_norm_backward", mutates_args=("out",), device_types="cpu")
def cpu_layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of LayerNorm over the channels of ``x`` ``[N, C]`` from mean and rstd ``[N, 1]``; ``out`` receives the
    output of the forward pass again.

    Returns:
        ``(grad_x, grad_weight, grad_bias)``.
    """
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    args = _LayerNormArgs(
        grad=_pointer(grad),
        x=_pointer(x),
        mean=_pointer(mean),
        rstd=_pointer(rstd),
        weight=_pointer(weight),
        bias=_pointer(bias),
        normed=_pointer(out),
        grad_x=_pointer(grad_x),
        grad_weight=_pointer(grad_weight),
        grad_bias=_pointer(grad_bias),
        rows=x.shape[0],
        channels=x.shape[1],
        threads=torch.get_num_threads(),
    )
    _call("sparse_ops_layer_norm_backward", args, x.dtype)
    return grad_x, grad_weight, grad_bias


@cpu_layer_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _mlp_args(
    x: Tensor, parameters: list[Tensor], row_offsets: Tensor, norm_eps: float, grn_eps: float, **tensors: Tensor
) -> _MLPArgs:
    return _MLPArgs(
        x=_pointer(x),
        **{name: _pointer(value) for name, value in zip(_MLP_PARAMETERS, parameters, strict=True)},
        offsets=_pointer(row_offsets),
        **{name: _pointer(value) for name, value in tensors.items()},
        norm_eps=norm_eps,
        grn_eps=grn_eps,
        groups=row_offsets.numel() - 1,
        channels=x.shape[1],
        dim=parameters[2].shape[0],
        threads=torch.get_num_threads(),
    )


def _mlp_outputs(
    x: Tensor, parameters: list[Tensor], row_offsets: Tensor, norm_eps: float, grn_eps: float
) -> list[Tensor]:
    """Memory for what is kept and for the result, in the order of ``_MLP_OUTPUTS``."""
    rows, dim = x.shape[0], parameters[2].shape[0]
    shapes = ((rows, dim), (rows, 1), (rows, 1), (row_offsets.numel() - 1, dim))
    return [*(x.new_empty(shape) for shape in shapes), torch.empty_like(x)]


@torch.library.custom_op("sparse_ops::cpu_mlp", mutates_args=(), device_types="cpu")
def cpu_mlp(x: Tensor, parameters: list[Tensor], row_offsets: Tensor, norm_eps: float, grn_eps: float) -> list[Tensor]:
    """See :meth:`sparse_ops.backend.Backend.mlp`: what is kept, then the result."""
    outputs = _mlp_outputs(x, parameters, row_offsets, norm_eps, grn_eps)
    named = dict(zip(_MLP_OUTPUTS, outputs, strict=True))
    _call("sparse_ops_mlp", _mlp_args(x, parameters, row_offsets, norm_eps, grn_eps, **named), x.dtype)
    return outputs


cpu_mlp.register_fake(_mlp_outputs)


@torch.library.custom_op("sparse_ops::cpu_mlp_backward", mutates_args=(), device_types="cpu")
def cpu_mlp_backward(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    row_offsets: Tensor,
    kept: list[Tensor],
    norm_eps: float,
    grn_eps: float,
) -> list[Tensor]:
    """See :meth:`sparse_ops.backend.Backend.mlp_backward`."""
    grads = [torch.empty_like(tensor) for tensor in (x, *parameters)]
    named = {f"grad_{name}": value for name, value in zip(("x", *_MLP_PARAMETERS), grads, strict=True)}
    named |= zip(_MLP_OUTPUTS[:-1], kept, strict=True)
    args = _mlp_args(x, parameters, row_offsets, norm_eps, grn_eps, grad=grad, **named)
    _call("sparse_ops_mlp_backward", args, x.dtype)
    return grads


@cpu_mlp_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    row_offsets: Tensor,
    kept: list[Tensor],
    norm_eps: float,
    grn_eps: float,
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (x, *parameters)]

"""The kernels as operators of torch, with the shapes of their results for its compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ops.backends.cpu import library
from sparse_ops.backends.cpu.library import MLP_GRADS, MLP_OUTPUTS, MLP_PARAMETERS, call


def _alike(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


@torch.library.custom_op("sparse_ops::cpu_depthwise", mutates_args=(), device_types="cpu")
def cpu_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, side: int, reverse_taps: bool
) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.depthwise`; ``neighbours`` is the patch table ``[P, (2R + 1)²]``."""
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    out = torch.empty_like(x)
    tensors = {"x": x, "other": weight, "bias": bias, "neighbours": neighbours, "out": out}
    sizes = {"patches": neighbours.shape[0], "channels": x.shape[1], "side": side, "kernel": weight.shape[-1]}
    call("sparse_ops_depthwise", library.DEPTHWISE, x.dtype, **tensors, **sizes, reverse_taps=reverse_taps)
    return out


cpu_depthwise.register_fake(lambda x, *_: x.new_empty(x.shape))


@torch.library.custom_op("sparse_ops::cpu_depthwise_weight_grad", mutates_args=(), device_types="cpu")
def cpu_depthwise_weight_grad(x: Tensor, grad: Tensor, neighbours: Tensor, side: int, kernel_size: int) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.depthwise_weight_grad`."""
    x, grad = x.contiguous(), grad.contiguous()
    out = x.new_empty(x.shape[1], 1, kernel_size, kernel_size)
    sizes = {"patches": neighbours.shape[0], "channels": x.shape[1], "side": side, "kernel": kernel_size}
    tensors = {"x": x, "other": grad, "neighbours": neighbours, "out": out}
    call("sparse_ops_depthwise_weight_grad", library.DEPTHWISE, x.dtype, **tensors, **sizes)
    return out


cpu_depthwise_weight_grad.register_fake(lambda x, *rest: x.new_empty(x.shape[1], 1, rest[-1], rest[-1]))


@torch.library.custom_op("sparse_ops::cpu_gelu_grn", mutates_args=("out",), device_types="cpu")
def cpu_gelu_grn(
    h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, row_offsets: Tensor, eps: float, out: Tensor
) -> Tensor:
    """GRN of the GELU of ``h + bias`` into ``out``, both ``[N, D]`` (ConvNeXt V2, eq. 1-3).

    bias, gamma, beta are ``[D]``; norms are taken over the rows of each group of ``row_offsets`` ``[G + 1]`` int64.
    Returns these channel norms, ``[G, D]``.
    """
    groups, dim = row_offsets.numel() - 1, h.shape[1]
    norms = h.new_empty(groups, dim)
    tensors = {"h": h, "bias": bias, "gamma": gamma, "beta": beta, "offsets": row_offsets, "norms": norms, "y": out}
    call("sparse_ops_gelu_grn", library.GELU_GRN, h.dtype, **tensors, eps=eps, groups=groups, dim=dim)
    return norms


cpu_gelu_grn.register_fake(lambda h, *rest: h.new_empty(rest[3].numel() - 1, h.shape[1]))


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

    Returns ``(grad_gamma, grad_beta, gradient for h summed over the rows)``, each ``[D]``.
    """
    tensors = {"h": h, "bias": bias, "gamma": gamma, "beta": beta, "offsets": row_offsets, "norms": norms, "y": out}
    grads = _alike(gamma, beta, beta)
    tensors |= {"grad": grad, **dict(zip(("grad_gamma", "grad_beta", "grad_bias"), grads, strict=True))}
    sizes = {"groups": row_offsets.numel() - 1, "dim": h.shape[1]}
    call("sparse_ops_gelu_grn_backward", library.GELU_GRN, h.dtype, **tensors, **sizes, eps=eps)
    return grads[0], grads[1], grads[2]


cpu_gelu_grn_backward.register_fake(lambda grad, h, bias, gamma, beta, *_: tuple(_alike(gamma, beta, beta)))


@torch.library.custom_op("sparse_ops::cpu_layer_norm_backward", mutates_args=("out",), device_types="cpu")
def cpu_layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of LayerNorm over the channels of ``x`` ``[N, C]`` from mean and rstd ``[N, 1]``; ``out`` receives the
    output of the forward pass again. Returns ``(grad_x, grad_weight, grad_bias)``."""
    tensors = {"grad": grad, "x": x, "mean": mean, "rstd": rstd, "weight": weight, "bias": bias, "normed": out}
    grads = _alike(x, weight, bias)
    tensors |= zip(("grad_x", "grad_weight", "grad_bias"), grads, strict=True)
    sizes = {"rows": x.shape[0], "channels": x.shape[1]}
    call("sparse_ops_layer_norm_backward", library.LAYER_NORM, x.dtype, **tensors, **sizes)
    return grads[0], grads[1], grads[2]


cpu_layer_norm_backward.register_fake(lambda grad, x, mean, rstd, weight, bias, _: tuple(_alike(x, weight, bias)))


def call_mlp(function: str, x: Tensor, parameters: list[Tensor], row_offsets: Tensor, **fields: Any) -> None:
    """Call a function of the pointwise half, with pointers by their names in ``library.MLP``."""
    sizes = {"groups": row_offsets.numel() - 1, "channels": x.shape[1], "dim": parameters[2].shape[0]}
    fields |= zip(MLP_PARAMETERS, parameters, strict=True)
    call(function, library.MLP, x.dtype, x=x, offsets=row_offsets, **sizes, **fields)


def _mlp_outputs(
    x: Tensor, parameters: list[Tensor], row_offsets: Tensor, norm_eps: float, grn_eps: float
) -> list[Tensor]:
    """Memory for what is kept and for the result, in the order of ``MLP_OUTPUTS``."""
    rows, dim = x.shape[0], parameters[2].shape[0]
    shapes = ((rows, dim), (rows, 1), (rows, 1), (row_offsets.numel() - 1, dim))
    return [*(x.new_empty(shape) for shape in shapes), torch.empty_like(x)]


@torch.library.custom_op("sparse_ops::cpu_mlp", mutates_args=(), device_types="cpu")
def cpu_mlp(x: Tensor, parameters: list[Tensor], row_offsets: Tensor, norm_eps: float, grn_eps: float) -> list[Tensor]:
    """See :meth:`sparse_ops.backend.Backend.mlp`: what is kept, then the result."""
    outputs = _mlp_outputs(x, parameters, row_offsets, norm_eps, grn_eps)
    named = dict(zip(MLP_OUTPUTS, outputs, strict=True))
    call_mlp("sparse_ops_mlp", x, parameters, row_offsets, norm_eps=norm_eps, grn_eps=grn_eps, **named)
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
    grads = _alike(x, *parameters)
    named = {"grad": grad, **dict(zip(MLP_GRADS, grads, strict=True)), **dict(zip(MLP_OUTPUTS[:-1], kept, strict=True))}
    call_mlp("sparse_ops_mlp_backward", x, parameters, row_offsets, norm_eps=norm_eps, grn_eps=grn_eps, **named)
    return grads


cpu_mlp_backward.register_fake(lambda grad, x, parameters, *_: _alike(x, *parameters))

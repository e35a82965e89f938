"""The backward pass of the pointwise half as an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ops.backends.triton.launch import kernels_of
from sparse_ops.backends.triton.mlp import Hidden, contiguous, finish_tile, launch_tiles, norm_tile
from sparse_ops.backends.triton.products import product


@torch.library.custom_op("sparse_ops::triton_mlp_backward", mutates_args=())
def triton_mlp_backward(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    row_offsets: Tensor,
    rows: Tensor | None,
    kept: list[Tensor],
    norm_eps: float,
    grn_eps: float,
) -> list[Tensor]:
    """See :meth:`sparse_ops.backend.Backend.mlp_backward`; the gradient for x has the dtype of the hidden
    layer."""
    kernels = kernels_of("mlp")
    incoming, x, row_offsets, *rest = contiguous(grad, x, row_offsets, *parameters, *kept)
    parameters, kept = rest[: len(parameters)], rest[len(parameters) :]
    norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2 = parameters
    h, mean, rstd, norms, *narrow = kept
    if narrow[0].numel():
        w1, w2 = narrow
    grad_h, grad = torch.empty_like(h), incoming.to(h.dtype)
    if rows is None:
        product(grad, w2, out=grad_h)
    else:
        grad_h.zero_().index_copy_(0, rows, product(grad, w2))

    hidden = Hidden(h, row_offsets, x.shape[1])
    of_product, of_grad, of_b2 = (hidden.partial(width) for width in (*h.shape[1:] * 2, x.shape[1]))
    summed = grad_h, h, b1, row_offsets, of_product, of_grad, incoming, of_b2
    hidden.walk_both(kernels.grn_backward_sums_kernel, *summed, both=rows is None)
    found = scale, pull, grad_gamma, grad_beta = tuple(torch.empty_like(norms) for _ in range(4))
    kernel = kernels.grn_backward_scale_kernel
    hidden.each_group(kernel, of_product, of_grad, gamma, norms, *found, hidden.parts, grn_eps)
    y, of_b1 = torch.empty_like(h), of_product
    hidden.walk(kernels.grn_backward_apply_kernel, grad_h, h, b1, scale, pull, beta, row_offsets, y, of_b1)
    grad_w2 = product(grad.t(), y if rows is None else y.index_select(0, rows), parameters[6].dtype)
    del y

    grad_normed, normed = product(grad_h, w1), torch.empty_like(x, dtype=h.dtype)
    tile = norm_tile(x.shape[1])
    programs = min(512, -(-x.shape[0] // tile.rows))
    grad_x, of_norm = torch.empty_like(normed), x.new_empty(2, programs, x.shape[1], dtype=torch.float32)
    given = grad_normed, x, norm_weight, norm_bias, mean, rstd
    launch_tiles(kernels.layer_norm_backward_kernel, (programs,), tile, *given, grad_x, normed, of_norm, x.shape[0])
    grad_w1 = product(grad_h.t(), normed, parameters[2].dtype)
    sums = of_b1_, of_b2_, *_ = [torch.empty_like(t) for t in (b1, b2, gamma, beta, norm_weight, norm_bias)]
    counts = hidden.groups * hidden.parts, hidden.groups, programs, x.shape[1]
    partial = of_b1, of_b2, grad_gamma, grad_beta, of_norm
    tile = finish_tile(h.shape[1])
    launch_tiles(kernels_of("sums").finish_kernel, (tile.blocks, len(sums)), tile, *partial, *sums, *counts)
    if rows is not None:  # those of grad are not the parts' rows
        of_b2_ = grad.sum(0, dtype=torch.float32).to(b2.dtype)
    _, _, of_gamma, of_beta, of_norm_weight, of_norm_bias = sums
    return [grad_x, of_norm_weight, of_norm_bias, grad_w1, of_b1_, of_gamma, of_beta, grad_w2, of_b2_]


@triton_mlp_backward.register_fake
def _(grad: Tensor, x: Tensor, parameters: list[Tensor], *rest: Any) -> list[Tensor]:
    of_x = x.new_empty(x.shape, dtype=rest[2][0].dtype)
    return [of_x, *(tensor.new_empty(tensor.shape) for tensor in parameters)]

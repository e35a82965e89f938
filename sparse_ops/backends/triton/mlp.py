"""The pointwise half of a block as operators, and the tiles of its kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ops.backends.triton.launch import PROGRAMS, interpreting, kernels_of, launch


class RowTile(NamedTuple):
    """Rows and columns of a width that a program of a pointwise kernel takes at a time, and its warps."""

    width: int
    rows: int
    columns: int
    warps: int = 4

    @property
    def blocks(self) -> int:
        return -(-self.width // self.columns)


def _power_of_two(number: int, least: int = 16) -> int:
    return max(least, 1 << (number - 1).bit_length())


def norm_tile(channels: int) -> RowTile:
    """For LayerNorm, whose programs hold whole rows: 16 numbers a thread or so."""
    columns = _power_of_two(channels)
    return RowTile(channels, 128 if interpreting() else max(1, 2048 // columns), columns, 8 if columns > 2048 else 4)


def hidden_tile(dim: int) -> RowTile:
    """For GELU and GRN."""
    rows, most = (256, 256) if interpreting() else (32, 64)
    return RowTile(dim, rows, min(most, _power_of_two(dim)))


def scale_tile(dim: int) -> RowTile:
    """For the kernels that take a group's norms, a row of them at a time."""
    return RowTile(dim, 1, min(512 if interpreting() else 2048, _power_of_two(dim, 128)))


def _launch(kernel: Any, grid: tuple[int, ...], tile: RowTile, *args: Any) -> None:
    if all(grid):
        launch(kernel, grid, *args, TILE=tile, num_warps=tile.warps)


def _parts(rows: int, groups: int, tile: RowTile) -> int:
    """Parts that the rows of each group are cut into: enough programs for a GPU, by the shapes alone."""
    wanted = 2 * PROGRAMS // max(1, groups * tile.blocks)
    return max(1, min(wanted, 256, -(-rows // (max(1, groups) * tile.rows))))


class _Hidden:
    """Launches the kernels of the hidden layer."""

    def __init__(self, h: Tensor, row_offsets: Tensor) -> None:
        self.groups, self.tile = row_offsets.numel() - 1, hidden_tile(h.shape[1])
        self.parts = _parts(h.shape[0], self.groups, self.tile)
        self._h = h

    def partial(self) -> Tensor:
        """Memory for a sum of each part, ``[groups, parts, dim]`` float32."""
        return self._h.new_empty(self.groups, self.parts, self.tile.width, dtype=torch.float32)

    def walk(self, kernel: Any, *args: Any) -> None:
        """Over all rows: program (part, group, block of columns)."""
        _launch(kernel, (self.parts, self.groups, self.tile.blocks), self.tile, *args)

    def each_group(self, kernel: Any, *args: Any) -> None:
        _launch(kernel, (self.groups,), scale_tile(self.tile.width), *args)


def _mlp_outputs(
    x: Tensor, parameters: list[Tensor], row_offsets: Tensor, rows: Tensor | None, norm_eps: float, grn_eps: float
) -> list[Tensor]:
    """h, mean, rstd, norms and the result, uninitialised."""
    count, channels, dim = x.shape[0], x.shape[1], parameters[2].shape[0]
    return [
        x.new_empty(count, dim),
        *(x.new_empty(count, dtype=torch.float32) for _ in range(2)),
        x.new_empty(row_offsets.numel() - 1, dim, dtype=torch.float32),
        x.new_empty(count if rows is None else rows.numel(), channels),
    ]


@torch.library.custom_op("sparse_ops::triton_mlp", mutates_args=())
def triton_mlp(
    x: Tensor, parameters: list[Tensor], row_offsets: Tensor, rows: Tensor | None, norm_eps: float, grn_eps: float
) -> list[Tensor]:
    """See :meth:`sparse_ops.backend.Backend.mlp`: what is kept, then the result."""
    kernels = kernels_of("mlp")
    norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2 = parameters
    h, mean, rstd, norms, out = _mlp_outputs(x, parameters, row_offsets, rows, norm_eps, grn_eps)
    normed = torch.empty_like(x)
    tile = norm_tile(x.shape[1])
    grid = (-(-x.shape[0] // tile.rows), tile.blocks)
    _launch(kernels.layer_norm_kernel, grid, tile, x, norm_weight, norm_bias, normed, mean, rstd, x.shape[0], norm_eps)
    torch.mm(normed, w1.to(x.dtype).t(), out=h)
    hidden = _Hidden(h, row_offsets)
    partial, scale, y = hidden.partial(), torch.empty_like(norms), torch.empty_like(h)
    hidden.walk(kernels.gelu_energy_kernel, h, b1, row_offsets, partial)
    hidden.each_group(kernels.grn_scale_kernel, partial, gamma, norms, scale, hidden.parts, grn_eps)
    hidden.walk(kernels.grn_apply_kernel, h, b1, scale, beta, row_offsets, y)
    y = y if rows is None else y.index_select(0, rows)
    torch.addmm(b2.to(x.dtype), y, w2.to(x.dtype).t(), out=out)
    return [h, mean, rstd, norms, out]


triton_mlp.register_fake(_mlp_outputs)


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
    """See :meth:`sparse_ops.backend.Backend.mlp_backward`."""
    kernels = kernels_of("mlp")
    norm_weight, norm_bias, w1, b1, gamma, beta, w2, _ = parameters
    h, mean, rstd, norms = kept
    w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
    grad_h = torch.empty_like(h)
    if rows is None:
        torch.mm(grad, w2, out=grad_h)
    else:
        grad_h.zero_().index_copy_(0, rows, grad @ w2)

    hidden = _Hidden(h, row_offsets)
    product, plain = hidden.partial(), hidden.partial()
    hidden.walk(kernels.grn_backward_sums_kernel, grad_h, h, b1, row_offsets, product, plain)
    found = scale, pull, grad_gamma, grad_beta = tuple(torch.empty_like(norms) for _ in range(4))
    kernel = kernels.grn_backward_scale_kernel
    hidden.each_group(kernel, product, plain, gamma, norms, *found, hidden.parts, grn_eps)
    y, grad_b1 = torch.empty_like(h), product
    hidden.walk(kernels.grn_backward_apply_kernel, grad_h, h, b1, scale, pull, beta, row_offsets, y, grad_b1)
    grad_w2 = grad.t() @ (y if rows is None else y.index_select(0, rows))
    del y

    grad_normed, normed = grad_h @ w1, torch.empty_like(x)
    tile = norm_tile(x.shape[1])
    programs = min(512, -(-x.shape[0] // tile.rows))
    grad_x, partial = torch.empty_like(x), x.new_empty(2, programs, x.shape[1], dtype=torch.float32)
    given = grad_normed, x, norm_weight, norm_bias, mean, rstd
    _launch(kernels.layer_norm_backward_kernel, (programs,), tile, *given, grad_x, normed, *partial, x.shape[0])
    grad_norm, grad_w1 = [part.sum(0) for part in partial], grad_h.t() @ normed
    of_groups = grad_b1.sum((0, 1)), grad_gamma.sum(0), grad_beta.sum(0)
    grads = *grad_norm, grad_w1, *of_groups, grad_w2, grad.sum(0, dtype=torch.float32)
    return [grad_x, *(value.to(parameter.dtype) for value, parameter in zip(grads, parameters, strict=True))]


triton_mlp_backward.register_fake(lambda grad, x, parameters, *_: [torch.empty_like(t) for t in (x, *parameters)])

"""The pointwise half of a block as operators, and the tiles of its kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ops.backends.triton.launch import PROGRAMS, interpreting, kernels_of, launch
from sparse_ops.backends.triton.products import add_product, product, projected


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
    """For the kernels that take a group's norms; the rows are those of partial sums."""
    return RowTile(dim, 8, min(512, _power_of_two(dim, 64)), 8)


def finish_tile(dim: int) -> RowTile:
    """For the kernel that adds up partial sums: a row of them is a sum."""
    return RowTile(dim, 64, 64 if interpreting() else 32)


def launch_tiles(kernel: Any, grid: tuple[int, ...], tile: RowTile, *args: Any, **constants: Any) -> None:
    """Launch, unless there is nothing to do."""
    if all(grid):
        launch(kernel, grid, *args, TILE=tile, num_warps=tile.warps, **constants)


def _parts(rows: int, groups: int, tile: RowTile) -> int:
    """Parts that the rows of each group are cut into: enough programs for a GPU, by the shapes alone."""
    wanted = 2 * PROGRAMS // max(1, groups * tile.blocks)
    return max(1, min(wanted, 256, -(-rows // (max(1, groups) * tile.rows))))


COPIED = 2048
"""Numbers of each weight that a program copies to 16 bits."""


class Hidden:
    """Launches the kernels of the hidden layer."""

    def __init__(self, h: Tensor, row_offsets: Tensor, channels: int) -> None:
        self.groups, self.tile = row_offsets.numel() - 1, hidden_tile(h.shape[1])
        self.parts = _parts(h.shape[0], self.groups, self.tile)
        self.narrow = self.tile._replace(width=channels)
        self._h = h

    def partial(self, width: int) -> Tensor:
        """Memory for a sum of each part, ``[groups, parts, width]`` float32."""
        return self._h.new_empty(self.groups, self.parts, width, dtype=torch.float32)

    def walk(self, kernel: Any, *args: Any) -> None:
        """Over all rows: program (part, group, block of columns)."""
        launch_tiles(kernel, (self.parts, self.groups, self.tile.blocks), self.tile, *args)

    def walk_both(self, kernel: Any, *args: Any, both: bool) -> None:
        """As :meth:`walk`, and over the rows of a tensor ``[N, C]`` too where there is one."""
        blocks = self.tile.blocks + (self.narrow.blocks if both else 0)
        launch_tiles(kernel, (self.parts, self.groups, blocks), self.tile, *args, NARROW=self.narrow)

    def each_group(self, kernel: Any, *args: Any) -> None:
        launch_tiles(kernel, (self.groups,), scale_tile(self.tile.width), *args)


def contiguous(*tensors: Tensor) -> list[Tensor]:
    """Row-major, which the kernels take for granted."""
    return [tensor.contiguous() for tensor in tensors]


def _mlp_outputs(
    x: Tensor,
    parameters: list[Tensor],
    row_offsets: Tensor,
    rows: Tensor | None,
    norm_eps: float,
    grn_eps: float,
    shortcut: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """h, mean, rstd, norms, both weights in 16 bits where they are wider, and the result, uninitialised."""
    count, channels, dim = x.shape[0], x.shape[1], parameters[2].shape[0]
    wide = parameters[2].dtype != dtype
    return [
        x.new_empty(count, dim, dtype=dtype),
        *(x.new_empty(count, dtype=torch.float32) for _ in range(2)),
        x.new_empty(row_offsets.numel() - 1, dim, dtype=torch.float32),
        *(x.new_empty(shape if wide else (0, 0), dtype=dtype) for shape in ((dim, channels), (channels, dim))),
        x.new_empty(
            count if rows is None else rows.numel(), channels, dtype=dtype if shortcut is None else shortcut.dtype
        ),
    ]


@torch.library.custom_op("sparse_ops::triton_mlp", mutates_args=())
def triton_mlp(
    x: Tensor,
    parameters: list[Tensor],
    row_offsets: Tensor,
    rows: Tensor | None,
    norm_eps: float,
    grn_eps: float,
    shortcut: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """See :meth:`sparse_ops.backend.Backend.mlp`, computed in ``dtype``: what is kept, then the result.

    A ``shortcut`` ``[N, C]`` is added to the result, which has its dtype then; ``rows`` must be None.
    """
    kernels = kernels_of("mlp")
    x, row_offsets, *parameters = contiguous(x, row_offsets, *parameters)
    norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2 = parameters
    *kept, out = _mlp_outputs(x, parameters, row_offsets, rows, norm_eps, grn_eps, shortcut, dtype)
    h, mean, rstd, norms, *narrow = kept
    copied = narrow if narrow[0].numel() else (w1, w2)
    normed = x.new_empty(x.shape, dtype=dtype)
    tile = norm_tile(x.shape[1])
    programs = -(-x.shape[0] // tile.rows) + -(-narrow[0].numel() // COPIED)
    given = x, norm_weight, norm_bias, w1, w2, normed, mean, rstd, *copied
    launch_tiles(kernels.layer_norm_kernel, (programs,), tile, *given, x.shape[0], w1.numel(), norm_eps, CHUNK=COPIED)
    product(normed, copied[0].t(), out=h)
    hidden = Hidden(h, row_offsets, x.shape[1])
    partial, scale, y = hidden.partial(h.shape[1]), torch.empty_like(norms), torch.empty_like(h)
    hidden.walk(kernels.gelu_energy_kernel, h, b1, row_offsets, partial)
    hidden.each_group(kernels.grn_scale_kernel, partial, gamma, norms, scale, hidden.parts, grn_eps)
    # The result is begun with what does not depend on y, so that the product adds to it in place.
    begun = (out, b2, out) if shortcut is None else (shortcut.contiguous(), b2, out)
    applied = h, b1, scale, beta, row_offsets, y
    hidden.walk_both(kernels.grn_apply_kernel, *applied, *begun, both=shortcut is not None)
    if shortcut is not None:
        add_product(out, y, copied[1].t())
    else:
        projected(b2.to(dtype), y if rows is None else y.index_select(0, rows), copied[1].t(), out)
    return [*kept, out]


triton_mlp.register_fake(_mlp_outputs)

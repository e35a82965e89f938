"""Triton kernels that add up partial sums, in an order that the shapes alone decide. Importing this imports triton.

TILE is a :class:`~sparse_ops.backends.triton.mlp.RowTile`; partial sums are ``[parts, width]``, float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_of_parts(partial, first, parts, width, columns, inside, TILE: tl.constexpr):
    """Sum of the ``parts`` rows from ``first`` on: a tile is added to the tile before, and then its rows."""
    total = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    part = 0
    while part < parts:
        row = part + tl.arange(0, TILE.rows)
        at = partial + (first + row).to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.load(at, mask=(row < parts)[:, None] & inside[None, :], other=0.0)
        part += TILE.rows
    return tl.sum(total, 0)


@triton.jit
def _finish(partial, parts, width, out, TILE: tl.constexpr):
    columns = tl.program_id(0) * TILE.columns + tl.arange(0, TILE.columns)
    inside = columns < width
    total = sum_of_parts(partial, 0, parts, width, columns, inside, TILE)
    tl.store(out + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts", "groups", "programs"])
def finish_kernel(
    b1,
    b2,
    gamma,
    beta,
    partial,
    of_b1,
    of_b2,
    of_gamma,
    of_beta,
    of_norm_weight,
    of_norm_bias,
    parts,
    groups,
    programs,
    channels,
    TILE: tl.constexpr,
):
    """All sums over rows that the backward pass of the pointwise half leaves in parts; program (block, which sum).

    ``b1`` ``[parts, D]`` and ``b2`` ``[parts, C]``, ``gamma`` and ``beta`` ``[groups, D]``, and ``partial``
    ``[2, programs, C]`` for the LayerNorm's weight and bias.
    """
    which = tl.program_id(1)
    if which == 0:
        _finish(b1, parts, TILE.width, of_b1, TILE)
    elif which == 1:
        _finish(gamma, groups, TILE.width, of_gamma, TILE)
    elif which == 2:
        _finish(beta, groups, TILE.width, of_beta, TILE)
    elif which == 3:
        _finish(b2, parts, channels, of_b2, TILE)
    elif which == 4:
        _finish(partial, programs, channels, of_norm_weight, TILE)
    else:
        _finish(partial + programs * channels, programs, channels, of_norm_bias, TILE)

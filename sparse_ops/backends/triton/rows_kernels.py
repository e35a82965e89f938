"""Rows of a matrix and blocks of its columns, and what pointwise kernels do with narrow matrices besides: copies to a
narrower type, the beginning of a result, sums over rows. Importing this module imports triton.

TILE is a :class:`~sparse_ops.backends.triton.mlp.RowTile`; see :mod:`sparse_ops.backends.triton.mlp_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(at, valid):
    """As float32, 0 where not valid."""
    return tl.load(at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def columns_of(block, row, TILE: tl.constexpr):
    """The columns of a block, which of them there are, and where a row has them."""
    columns = block * TILE.columns + tl.arange(0, TILE.columns)
    return columns, columns < TILE.width, row.to(tl.int64) * TILE.width + columns


@triton.jit
def tile_of(row, end, columns, inside, TILE: tl.constexpr):
    """Places of ``[ROWS, BLOCK]`` numbers from ``row`` on, and which of them there are."""
    rows = row + tl.arange(0, TILE.rows)
    return rows.to(tl.int64)[:, None] * TILE.width + columns[None, :], (rows < end)[:, None] & inside[None, :]


@triton.jit
def rows_of(offsets):
    """A program's part, numbered through all groups, its first row, and the row after its last: parts are equal runs of
    a group's rows."""
    group, part, parts = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    begin, end = tl.load(offsets + group), tl.load(offsets + group + 1)
    length = (end - begin + parts - 1) // parts
    return group * parts + part, begin + part * length, tl.minimum(begin + (part + 1) * length, end)


@triton.jit
def copy(source, out, first, count, CHUNK: tl.constexpr):
    """Numbers from ``first`` on, in the type of ``out``."""
    at = first + tl.arange(0, CHUNK)
    tl.store(out + at, tl.load(source + at, mask=at < count, other=0.0).to(out.dtype.element_ty), mask=at < count)


@triton.jit
def begin(block, offsets, shortcut, b2, begun, TILE: tl.constexpr):
    """begun = shortcut + b2."""
    part, row, end = rows_of(offsets)
    columns, inside, _ = columns_of(block, part, TILE)
    b = load(b2 + columns, inside)[None, :]
    while row < end:
        at, valid = tile_of(row, end, columns, inside, TILE)
        tl.store(begun + at, (load(shortcut + at, valid) + b).to(begun.dtype.element_ty), mask=valid)
        row += TILE.rows


@triton.jit
def sums(block, offsets, incoming, partial, TILE: tl.constexpr):
    """Of the part's rows of ``incoming``."""
    part, row, end = rows_of(offsets)
    columns, inside, of_part = columns_of(block, part, TILE)
    total = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    while row < end:
        at, valid = tile_of(row, end, columns, inside, TILE)
        total += load(incoming + at, valid)
        row += TILE.rows
    tl.store(partial + of_part, tl.sum(total, 0), mask=inside)

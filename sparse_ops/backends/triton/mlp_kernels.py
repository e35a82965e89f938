"""Triton kernels of the pointwise half of a block: LayerNorm, and GELU with global response normalisation.

Matrix products are left to the library. Everything is computed in float32 whatever the tensors hold. Sums over rows are
cut by the shapes alone, so they come out with the same bits every time.

Shapes: N rows, C channels, D hidden channels, G groups of rows over which GRN takes its norms, ``offsets`` ``[G + 1]``.
TILE is a :class:`~sparse_ops.backends.triton.mlp.RowTile`. Kernels that walk over the hidden layer have a program a
(part, group, block of columns); their partial sums are ``[G, parts, D]``, float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1 + tl.erf(x * _SQRT_HALF))


@triton.jit
def _gelu_and_derivative(x):
    below = 0.5 * (1 + tl.erf(x * _SQRT_HALF))
    return x * below, below + x * (_DENSITY_AT_0 * tl.exp(-0.5 * x * x))


@triton.jit
def _load(at, valid):
    return tl.load(at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _columns(block, row, TILE: tl.constexpr):
    """The columns of a block, which of them there are, and where a row has them."""
    columns = block * TILE.columns + tl.arange(0, TILE.columns)
    return columns, columns < TILE.width, row.to(tl.int64) * TILE.width + columns


@triton.jit
def _tile(row, end, columns, inside, TILE: tl.constexpr):
    """Places of ``[ROWS, BLOCK]`` numbers from ``row`` on, and which of them there are."""
    rows = row + tl.arange(0, TILE.rows)
    return rows.to(tl.int64)[:, None] * TILE.width + columns[None, :], (rows < end)[:, None] & inside[None, :]


@triton.jit
def _walk(offsets, TILE: tl.constexpr):
    """Columns of a program, which of them there are, where its part has them, first row, and the row after the last:
    parts are equal runs of a group's rows."""
    group, part, parts = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    columns, inside, of_part = _columns(tl.program_id(2), group * parts + part, TILE)
    begin, end = tl.load(offsets + group), tl.load(offsets + group + 1)
    length = (end - begin + parts - 1) // parts
    return columns, inside, of_part, begin + part * length, tl.minimum(begin + (part + 1) * length, end)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(x, weight, bias, out, mean, rstd, rows, eps, TILE: tl.constexpr):
    """out = (x - mean) · rstd · weight + bias; one program for a tile's rows."""
    first = tl.program_id(0) * TILE.rows
    columns, inside, _ = _columns(0, first, TILE)
    at, valid = _tile(first, rows, columns, inside, TILE)
    value = _load(x + at, valid)
    centre = tl.sum(value, 1) / TILE.width
    value = tl.where(inside[None, :], value - centre[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(value * value, 1) / TILE.width + eps)
    w, b = _load(weight + columns, inside), _load(bias + columns, inside)
    normed = value * scale[:, None] * w[None, :] + b[None, :]
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=valid)
    row = first + tl.arange(0, TILE.rows)
    tl.store(mean + row, centre, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_backward_kernel(
    grad, x, weight, bias, mean, rstd, grad_x, normed, partial_weight, partial_bias, rows, TILE: tl.constexpr
):
    """Gradients of LayerNorm; a program takes an equal run of the rows, a tile's at a time.

    ``normed`` receives the output of the forward pass again; the partial sums are ``[programs, C]``, float32.
    """
    program = tl.program_id(0)
    columns, inside, of_program = _columns(0, program, TILE)
    length = tl.cdiv(rows, tl.num_programs(0))
    row = program * length
    end = tl.minimum(row + length, rows)
    w, b = _load(weight + columns, inside)[None, :], _load(bias + columns, inside)[None, :]
    sum_weight = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    sum_bias = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    while row < end:
        at, valid = _tile(row, end, columns, inside, TILE)
        own = row + tl.arange(0, TILE.rows)
        centre, scale = _load(mean + own, own < end)[:, None], _load(rstd + own, own < end)[:, None]
        unit = tl.where(valid, (_load(x + at, valid) - centre) * scale, 0.0)
        tl.store(normed + at, (unit * w + b).to(normed.dtype.element_ty), mask=valid)
        incoming = _load(grad + at, valid)
        sum_weight += incoming * unit
        sum_bias += incoming
        incoming *= w
        along = tl.sum(incoming * unit, 1)[:, None] / TILE.width
        level = tl.sum(incoming, 1)[:, None] / TILE.width
        outgoing = (incoming - level - unit * along) * scale
        tl.store(grad_x + at, outgoing.to(grad_x.dtype.element_ty), mask=valid)
        row += TILE.rows
    tl.store(partial_weight + of_program, tl.sum(sum_weight, 0), mask=inside)
    tl.store(partial_bias + of_program, tl.sum(sum_bias, 0), mask=inside)


@triton.jit
def gelu_energy_kernel(h, bias, offsets, partial, TILE: tl.constexpr):
    """partial[group, part] = sum of GELU(h + bias)² over the part's rows."""
    columns, inside, of_part, row, end = _walk(offsets, TILE)
    b = _load(bias + columns, inside)[None, :]
    energy = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    while row < end:
        at, valid = _tile(row, end, columns, inside, TILE)
        value = _gelu(_load(h + at, valid) + b)
        energy += tl.where(valid, value * value, 0.0)
        row += TILE.rows
    tl.store(partial + of_part, tl.sum(energy, 0), mask=inside)


@triton.jit
def _sum_of_parts(partial, group, parts, columns, inside, TILE: tl.constexpr):
    total = tl.full([TILE.columns], 0, tl.float32)
    part = 0
    while part < parts:
        total += _load(partial + (group * parts + part).to(tl.int64) * TILE.width + columns, inside)
        part += 1
    return total


@triton.jit(do_not_specialize=["parts"])
def grn_scale_kernel(partial, gamma, norms, scale, parts, eps, TILE: tl.constexpr):
    """Norms ``[G, D]`` of a group's channels, and scale = 1 + gamma · norm / (mean of the norms + eps)."""
    BLOCKS: tl.constexpr = (TILE.width + TILE.columns - 1) // TILE.columns  # Triton 3.8 knows fields, not properties
    group = tl.program_id(0)
    total = 0.0
    for block in tl.static_range(BLOCKS):
        columns, inside, at = _columns(block, group, TILE)
        norm = tl.sqrt(_sum_of_parts(partial, group, parts, columns, inside, TILE))
        tl.store(norms + at, norm, mask=inside)
        total += tl.sum(norm, 0)
    tl.debug_barrier()  # what was stored above is read below, maybe by other threads
    mean = total / TILE.width + eps
    for block in tl.static_range(BLOCKS):
        columns, inside, at = _columns(block, group, TILE)
        norm, weight = _load(norms + at, inside), _load(gamma + columns, inside)
        tl.store(scale + at, 1 + weight * (norm / mean), mask=inside)


@triton.jit
def grn_apply_kernel(h, bias, scale, beta, offsets, out, TILE: tl.constexpr):
    """out = GELU(h + bias) · scale[group] + beta."""
    columns, inside, _, row, end = _walk(offsets, TILE)
    of_group = tl.program_id(1).to(tl.int64) * TILE.width + columns
    b, s = _load(bias + columns, inside)[None, :], _load(scale + of_group, inside)[None, :]
    shift = _load(beta + columns, inside)[None, :]
    while row < end:
        at, valid = _tile(row, end, columns, inside, TILE)
        value = _gelu(_load(h + at, valid) + b)
        tl.store(out + at, (value * s + shift).to(out.dtype.element_ty), mask=valid)
        row += TILE.rows


@triton.jit
def grn_backward_sums_kernel(grad, h, bias, offsets, partial_product, partial_grad, TILE: tl.constexpr):
    """Sums of grad · GELU(h + bias) and of grad over the part's rows."""
    columns, inside, of_part, row, end = _walk(offsets, TILE)
    b = _load(bias + columns, inside)[None, :]
    product = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    plain = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    while row < end:
        at, valid = _tile(row, end, columns, inside, TILE)
        incoming = _load(grad + at, valid)
        product += incoming * _gelu(_load(h + at, valid) + b)
        plain += incoming
        row += TILE.rows
    tl.store(partial_product + of_part, tl.sum(product, 0), mask=inside)
    tl.store(partial_grad + of_part, tl.sum(plain, 0), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def grn_backward_scale_kernel(
    partial_product, partial_grad, gamma, norms, scale, pull, grad_gamma, grad_beta, parts, eps, TILE: tl.constexpr
):
    """What the sums over a group say about its norms and about gamma and beta, all ``[G, D]``.

    ``scale`` receives the factor of the forward pass again, ``pull`` the derivative through a channel's norm,
    dL/dnorm / norm; ``grad_gamma`` and ``grad_beta`` are to be summed over the groups.
    """
    BLOCKS: tl.constexpr = (TILE.width + TILE.columns - 1) // TILE.columns  # Triton 3.8 knows fields, not properties
    group = tl.program_id(0)
    total = 0.0
    inner = 0.0
    for block in tl.static_range(BLOCKS):
        columns, inside, at = _columns(block, group, TILE)
        norm, weight = _load(norms + at, inside), _load(gamma + columns, inside)
        product = _sum_of_parts(partial_product, group, parts, columns, inside, TILE)
        tl.store(pull + at, product, mask=inside)  # read again below
        tl.store(grad_beta + at, _sum_of_parts(partial_grad, group, parts, columns, inside, TILE), mask=inside)
        total += tl.sum(norm, 0)
        inner += tl.sum(product * weight * norm, 0)
    tl.debug_barrier()  # what was stored above is read below, maybe by other threads
    mean = total / TILE.width + eps
    for block in tl.static_range(BLOCKS):
        columns, inside, at = _columns(block, group, TILE)
        norm, weight = _load(norms + at, inside), _load(gamma + columns, inside)
        product, relative = _load(pull + at, inside), norm / mean
        tl.store(scale + at, 1 + weight * relative, mask=inside)
        tl.store(grad_gamma + at, product * relative, mask=inside)
        of_norm = (product * weight - inner / (mean * TILE.width)) / mean
        alive = norm > 0
        tl.store(pull + at, tl.where(alive, of_norm / tl.where(alive, norm, 1.0), 0.0), mask=inside)


@triton.jit
def grn_backward_apply_kernel(grad, h, bias, scale, pull, beta, offsets, out, partial_bias, TILE: tl.constexpr):
    """grad = (grad · scale + pull · GELU) · GELU', the gradient for h in its place.

    ``out`` receives the output of the forward pass again.
    """
    columns, inside, of_part, row, end = _walk(offsets, TILE)
    of_group = tl.program_id(1).to(tl.int64) * TILE.width + columns
    b, s = _load(bias + columns, inside)[None, :], _load(scale + of_group, inside)[None, :]
    p, shift = _load(pull + of_group, inside)[None, :], _load(beta + columns, inside)[None, :]
    total = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    while row < end:
        at, valid = _tile(row, end, columns, inside, TILE)
        value, derivative = _gelu_and_derivative(_load(h + at, valid) + b)
        tl.store(out + at, (value * s + shift).to(out.dtype.element_ty), mask=valid)
        outgoing = (_load(grad + at, valid) * s + p * value) * derivative
        tl.store(grad + at, outgoing.to(grad.dtype.element_ty), mask=valid)
        total += tl.where(valid, outgoing, 0.0)
        row += TILE.rows
    tl.store(partial_bias + of_part, tl.sum(total, 0), mask=inside)

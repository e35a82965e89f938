"""Triton kernels of the pointwise half of a block: LayerNorm, and GELU with global response normalisation.

Matrix products are left to the library. Everything is computed in float32 whatever the tensors hold. Sums over rows are
cut by the shapes alone, so they come out with the same bits every time.

Shapes: N rows, C channels, D hidden channels, G groups of rows over which GRN takes its norms, ``offsets`` ``[G + 1]``.
TILE is a :class:`~sparse_ops.backends.triton.mlp.RowTile`. Kernels that walk over the hidden layer have a program a
(part, group, block of columns); their partial sums are ``[G, parts, D]``, float32. Further blocks of columns, where
there are any, are those of a tensor ``[N, C]`` that the same launch treats besides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_ops.backends.triton.gelu_kernels import gelu, gelu_and_derivative
from sparse_ops.backends.triton.rows_kernels import begin, columns_of, copy, load, rows_of, sums, tile_of
from sparse_ops.backends.triton.sums_kernels import sum_of_parts


@triton.jit
def _walk(offsets, TILE: tl.constexpr):
    """Columns of a program, which of them there are, where its part has them, and its rows as :func:`rows_of`."""
    part, row, end = rows_of(offsets)
    columns, inside, of_part = columns_of(tl.program_id(2), part, TILE)
    return columns, inside, of_part, row, end


@triton.constexpr_function
def _blocks(TILE):
    width, _, columns, _ = TILE
    return -(-width // columns)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x,
    weight,
    bias,
    w1,
    w2,
    out,
    mean,
    rstd,
    narrow_w1,
    narrow_w2,
    rows,
    numbers,
    eps,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """out = (x - mean) · rstd · weight + bias; one program for a tile's rows.

    Programs after those copy the weights of the products, ``numbers`` each, to a narrower type, CHUNK at a time.
    """
    first = tl.program_id(0) * TILE.rows
    if first < rows:
        columns, inside, _ = columns_of(0, first, TILE)
        at, valid = tile_of(first, rows, columns, inside, TILE)
        value = load(x + at, valid)
        centre = tl.sum(value, 1) / TILE.width
        value = tl.where(inside[None, :], value - centre[:, None], 0.0)
        scale = 1 / tl.sqrt(tl.sum(value * value, 1) / TILE.width + eps)
        w, b = load(weight + columns, inside), load(bias + columns, inside)
        normed = value * scale[:, None] * w[None, :] + b[None, :]
        tl.store(out + at, normed.to(out.dtype.element_ty), mask=valid)
        row = first + tl.arange(0, TILE.rows)
        tl.store(mean + row, centre, mask=row < rows)
        tl.store(rstd + row, scale, mask=row < rows)
    else:
        begin = (tl.program_id(0) - tl.cdiv(rows, TILE.rows)) * CHUNK
        copy(w1, narrow_w1, begin, numbers, CHUNK)
        copy(w2, narrow_w2, begin, numbers, CHUNK)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_backward_kernel(grad, x, weight, bias, mean, rstd, grad_x, normed, partial, rows, TILE: tl.constexpr):
    """Gradients of LayerNorm; a program takes an equal run of the rows, a tile's at a time.

    ``normed`` receives the output of the forward pass again; ``partial`` ``[2, programs, C]``, float32, the sums of the
    gradients for weight and bias.
    """
    program = tl.program_id(0)
    columns, inside, of_program = columns_of(0, program, TILE)
    length = tl.cdiv(rows, tl.num_programs(0))
    row = program * length
    end = tl.minimum(row + length, rows)
    w, b = load(weight + columns, inside)[None, :], load(bias + columns, inside)[None, :]
    sum_weight = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    sum_bias = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    while row < end:
        at, valid = tile_of(row, end, columns, inside, TILE)
        own = row + tl.arange(0, TILE.rows)
        centre, scale = load(mean + own, own < end)[:, None], load(rstd + own, own < end)[:, None]
        unit = tl.where(valid, (load(x + at, valid) - centre) * scale, 0.0)
        tl.store(normed + at, (unit * w + b).to(normed.dtype.element_ty), mask=valid)
        incoming = load(grad + at, valid)
        sum_weight += incoming * unit
        sum_bias += incoming
        incoming *= w
        along = tl.sum(incoming * unit, 1)[:, None] / TILE.width
        level = tl.sum(incoming, 1)[:, None] / TILE.width
        outgoing = (incoming - level - unit * along) * scale
        tl.store(grad_x + at, outgoing.to(grad_x.dtype.element_ty), mask=valid)
        row += TILE.rows
    of_sum = tl.num_programs(0) * TILE.width
    tl.store(partial + of_program, tl.sum(sum_weight, 0), mask=inside)
    tl.store(partial + of_sum + of_program, tl.sum(sum_bias, 0), mask=inside)


@triton.jit
def gelu_energy_kernel(h, bias, offsets, partial, TILE: tl.constexpr):
    """partial[group, part] = sum of GELU(h + bias)² over the part's rows."""
    EXACT: tl.constexpr = h.dtype.element_ty == tl.float32
    columns, inside, of_part, row, end = _walk(offsets, TILE)
    b = load(bias + columns, inside)[None, :]
    energy = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    while row < end:
        at, valid = tile_of(row, end, columns, inside, TILE)
        value = gelu(load(h + at, valid) + b, EXACT)
        energy += tl.where(valid, value * value, 0.0)
        row += TILE.rows
    tl.store(partial + of_part, tl.sum(energy, 0), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def grn_scale_kernel(partial, gamma, norms, scale, parts, eps, TILE: tl.constexpr):
    """Norms ``[G, D]`` of a group's channels, and scale = 1 + gamma · norm / (mean of the norms + eps)."""
    group = tl.program_id(0)
    total = 0.0
    block = 0
    while block < _blocks(TILE):
        columns, inside, at = columns_of(block, group, TILE)
        norm = tl.sqrt(sum_of_parts(partial, group * parts, parts, TILE.width, columns, inside, TILE))
        tl.store(norms + at, norm, mask=inside)
        total += tl.sum(norm, 0)
        block += 1
    tl.debug_barrier()  # what was stored above is read below, maybe by other threads
    mean = total / TILE.width + eps
    block = 0
    while block < _blocks(TILE):
        columns, inside, at = columns_of(block, group, TILE)
        norm, weight = load(norms + at, inside), load(gamma + columns, inside)
        tl.store(scale + at, 1 + weight * (norm / mean), mask=inside)
        block += 1


@triton.jit
def _apply(h, bias, scale, beta, offsets, out, TILE: tl.constexpr):
    EXACT: tl.constexpr = h.dtype.element_ty == tl.float32
    columns, inside, _, row, end = _walk(offsets, TILE)
    of_group = tl.program_id(1).to(tl.int64) * TILE.width + columns
    b, s = load(bias + columns, inside)[None, :], load(scale + of_group, inside)[None, :]
    shift = load(beta + columns, inside)[None, :]
    while row < end:
        at, valid = tile_of(row, end, columns, inside, TILE)
        value = gelu(load(h + at, valid) + b, EXACT)
        tl.store(out + at, (value * s + shift).to(out.dtype.element_ty), mask=valid)
        row += TILE.rows


@triton.jit
def grn_apply_kernel(h, bias, scale, beta, offsets, out, shortcut, b2, begun, TILE: tl.constexpr, NARROW: tl.constexpr):
    """out = GELU(h + bias) · scale[group] + beta; in the blocks beyond, begun = shortcut + b2."""
    if tl.program_id(2) < _blocks(TILE):
        _apply(h, bias, scale, beta, offsets, out, TILE)
    else:
        begin(tl.program_id(2) - _blocks(TILE), offsets, shortcut, b2, begun, NARROW)


@triton.jit
def _products(grad, h, bias, offsets, partial_product, partial_grad, TILE: tl.constexpr):
    EXACT: tl.constexpr = h.dtype.element_ty == tl.float32
    columns, inside, of_part, row, end = _walk(offsets, TILE)
    b = load(bias + columns, inside)[None, :]
    product = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    plain = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    while row < end:
        at, valid = tile_of(row, end, columns, inside, TILE)
        given = load(grad + at, valid)
        product += given * gelu(load(h + at, valid) + b, EXACT)
        plain += given
        row += TILE.rows
    tl.store(partial_product + of_part, tl.sum(product, 0), mask=inside)
    tl.store(partial_grad + of_part, tl.sum(plain, 0), mask=inside)


@triton.jit
def grn_backward_sums_kernel(
    grad,
    h,
    bias,
    offsets,
    partial_product,
    partial_grad,
    incoming,
    partial_b2,
    TILE: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Sums of grad · GELU(h + bias) and of grad over the part's rows; in the blocks beyond those of ``incoming``."""
    if tl.program_id(2) < _blocks(TILE):
        _products(grad, h, bias, offsets, partial_product, partial_grad, TILE)
    else:
        sums(tl.program_id(2) - _blocks(TILE), offsets, incoming, partial_b2, NARROW)


@triton.jit(do_not_specialize=["parts"])
def grn_backward_scale_kernel(
    partial_product, partial_grad, gamma, norms, scale, pull, grad_gamma, grad_beta, parts, eps, TILE: tl.constexpr
):
    """What the sums over a group say about its norms and about gamma and beta, all ``[G, D]``.

    ``scale`` receives the factor of the forward pass again, ``pull`` the derivative through a channel's norm,
    dL/dnorm / norm; ``grad_gamma`` and ``grad_beta`` are to be summed over the groups.
    """
    group = tl.program_id(0)
    total = 0.0
    inner = 0.0
    block = 0
    while block < _blocks(TILE):
        columns, inside, at = columns_of(block, group, TILE)
        norm, weight = load(norms + at, inside), load(gamma + columns, inside)
        product = sum_of_parts(partial_product, group * parts, parts, TILE.width, columns, inside, TILE)
        plain = sum_of_parts(partial_grad, group * parts, parts, TILE.width, columns, inside, TILE)
        tl.store(pull + at, product, mask=inside)  # read again below
        tl.store(grad_beta + at, plain, mask=inside)
        total += tl.sum(norm, 0)
        inner += tl.sum(product * weight * norm, 0)
        block += 1
    tl.debug_barrier()  # what was stored above is read below, maybe by other threads
    mean = total / TILE.width + eps
    block = 0
    while block < _blocks(TILE):
        columns, inside, at = columns_of(block, group, TILE)
        norm, weight = load(norms + at, inside), load(gamma + columns, inside)
        product, relative = load(pull + at, inside), norm / mean
        tl.store(scale + at, 1 + weight * relative, mask=inside)
        tl.store(grad_gamma + at, product * relative, mask=inside)
        of_norm = (product * weight - inner / (mean * TILE.width)) / mean
        alive = norm > 0
        tl.store(pull + at, tl.where(alive, of_norm / tl.where(alive, norm, 1.0), 0.0), mask=inside)
        block += 1


@triton.jit
def grn_backward_apply_kernel(grad, h, bias, scale, pull, beta, offsets, out, partial_bias, TILE: tl.constexpr):
    """grad = (grad · scale + pull · GELU) · GELU', the gradient for h in its place.

    ``out`` receives the output of the forward pass again.
    """
    EXACT: tl.constexpr = h.dtype.element_ty == tl.float32
    columns, inside, of_part, row, end = _walk(offsets, TILE)
    of_group = tl.program_id(1).to(tl.int64) * TILE.width + columns
    b, s = load(bias + columns, inside)[None, :], load(scale + of_group, inside)[None, :]
    p, shift = load(pull + of_group, inside)[None, :], load(beta + columns, inside)[None, :]
    total = tl.full([TILE.rows, TILE.columns], 0, tl.float32)
    while row < end:
        at, valid = tile_of(row, end, columns, inside, TILE)
        value, derivative = gelu_and_derivative(load(h + at, valid) + b, EXACT)
        tl.store(out + at, (value * s + shift).to(out.dtype.element_ty), mask=valid)
        outgoing = (load(grad + at, valid) * s + p * value) * derivative
        tl.store(grad + at, outgoing.to(grad.dtype.element_ty), mask=valid)
        total += tl.where(valid, outgoing, 0.0)
        row += TILE.rows
    tl.store(partial_bias + of_part, tl.sum(total, 0), mask=inside)

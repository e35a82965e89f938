"""Triton kernels of the pointwise half of a block: LayerNorm, and GELU with global response normalisation.

Matrix products are left to the library. Everything is computed in float32 whatever the tensors hold. Sums over rows are
cut by the shapes alone, so they come out with the same bits every time.

Shapes: N rows, C channels, D hidden channels, G groups of rows over which GRN takes its norms, ``offsets`` ``[G + 1]``.
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
def _columns(BLOCK: tl.constexpr, WIDTH: tl.constexpr, block):
    columns = block * BLOCK + tl.arange(0, BLOCK)
    return columns, columns < WIDTH


@triton.jit
def _part_of_group(offsets, group, part, parts):
    """First row, and the row after the last, of one of ``parts`` equal runs of a group's rows."""
    begin = tl.load(offsets + group)
    end = tl.load(offsets + group + 1)
    length = (end - begin + parts - 1) // parts
    return begin + part * length, tl.minimum(begin + (part + 1) * length, end)


@triton.jit
def _tile(row, end, columns, inside, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Places of ``[ROWS, BLOCK]`` numbers from ``row`` on, and which of them there are."""
    rows = row + tl.arange(0, ROWS)
    return rows.to(tl.int64)[:, None] * WIDTH + columns[None, :], (rows < end)[:, None] & inside[None, :]


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x, weight, bias, out, mean, rstd, rows, eps, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out = (x - mean) · rstd · weight + bias; one program for ROWS rows."""
    columns, inside = _columns(BLOCK, WIDTH, 0)
    first = tl.program_id(0) * ROWS
    at, valid = _tile(first, rows, columns, inside, WIDTH, ROWS)
    value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    centre = tl.sum(value, 1) / WIDTH
    value = tl.where(inside[None, :], value - centre[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(value * value, 1) / WIDTH + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    normed = value * scale[:, None] * w[None, :] + b[None, :]
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=valid)
    row = first + tl.arange(0, ROWS)
    tl.store(mean + row, centre, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_backward_kernel(
    grad,
    x,
    weight,
    bias,
    mean,
    rstd,
    grad_x,
    normed,  # receives the output of the forward pass again
    partial_weight,  # [programs, C], float32
    partial_bias,  # [programs, C], float32
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of LayerNorm; a program takes an equal run of the rows, ROWS at a time."""
    columns, inside = _columns(BLOCK, WIDTH, 0)
    program = tl.program_id(0)
    length = tl.cdiv(rows, tl.num_programs(0))
    row = program * length
    end = tl.minimum(row + length, rows)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    sum_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    while row < end:
        at, valid = _tile(row, end, columns, inside, WIDTH, ROWS)
        own = row + tl.arange(0, ROWS)
        centre = tl.load(mean + own, mask=own < end, other=0.0)[:, None]
        scale = tl.load(rstd + own, mask=own < end, other=0.0)[:, None]
        unit = (tl.load(x + at, mask=valid, other=0.0).to(tl.float32) - centre) * scale
        unit = tl.where(valid, unit, 0.0)
        tl.store(normed + at, (unit * w + b).to(normed.dtype.element_ty), mask=valid)
        incoming = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
        sum_weight += incoming * unit
        sum_bias += incoming
        incoming *= w
        along = tl.sum(incoming * unit, 1)[:, None] / WIDTH
        level = tl.sum(incoming, 1)[:, None] / WIDTH
        outgoing = (incoming - level - unit * along) * scale
        tl.store(grad_x + at, outgoing.to(grad_x.dtype.element_ty), mask=valid)
        row += ROWS
    to = program.to(tl.int64) * WIDTH + columns
    tl.store(partial_weight + to, tl.sum(sum_weight, 0), mask=inside)
    tl.store(partial_bias + to, tl.sum(sum_bias, 0), mask=inside)


@triton.jit
def gelu_energy_kernel(h, bias, offsets, partial, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """partial[group, part] = sum of GELU(h + bias)² over the part's rows; program (part, group, block of columns)."""
    columns, inside = _columns(BLOCK, WIDTH, tl.program_id(2))
    group, part, parts = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    row, end = _part_of_group(offsets, group, part, parts)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    energy = tl.zeros([ROWS, BLOCK], tl.float32)
    while row < end:
        at, valid = _tile(row, end, columns, inside, WIDTH, ROWS)
        value = _gelu(tl.load(h + at, mask=valid, other=0.0).to(tl.float32) + b)
        energy += tl.where(valid, value * value, 0.0)
        row += ROWS
    tl.store(partial + (group * parts + part).to(tl.int64) * WIDTH + columns, tl.sum(energy, 0), mask=inside)


@triton.jit
def _sum_of_parts(partial, group, parts, columns, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    part = 0
    while part < parts:
        total += tl.load(partial + (group * parts + part).to(tl.int64) * WIDTH + columns, mask=inside, other=0.0)
        part += 1
    return total


@triton.jit(do_not_specialize=["parts"])
def grn_scale_kernel(partial, gamma, norms, scale, parts, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Norms ``[G, D]`` of a group's channels, and scale = 1 + gamma · norm / (mean of the norms + eps)."""
    group = tl.program_id(0)
    total = 0.0
    for block in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
        columns, inside = _columns(BLOCK, WIDTH, block)
        norm = tl.sqrt(_sum_of_parts(partial, group, parts, columns, inside, WIDTH, BLOCK))
        tl.store(norms + group.to(tl.int64) * WIDTH + columns, norm, mask=inside)
        total += tl.sum(norm, 0)
    tl.debug_barrier()  # what was stored above is read below, maybe by other threads
    mean = total / WIDTH + eps
    for block in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
        columns, inside = _columns(BLOCK, WIDTH, block)
        at = group.to(tl.int64) * WIDTH + columns
        norm = tl.load(norms + at, mask=inside, other=0.0)
        weight = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(scale + at, 1 + weight * (norm / mean), mask=inside)


@triton.jit
def grn_apply_kernel(h, bias, scale, beta, offsets, out, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out = GELU(h + bias) · scale[group] + beta; program (part, group, block of columns)."""
    columns, inside = _columns(BLOCK, WIDTH, tl.program_id(2))
    group = tl.program_id(1)
    row, end = _part_of_group(offsets, group, tl.program_id(0), tl.num_programs(0))
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    s = tl.load(scale + group.to(tl.int64) * WIDTH + columns, mask=inside, other=0.0)[None, :]
    shift = tl.load(beta + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    while row < end:
        at, valid = _tile(row, end, columns, inside, WIDTH, ROWS)
        value = _gelu(tl.load(h + at, mask=valid, other=0.0).to(tl.float32) + b)
        tl.store(out + at, (value * s + shift).to(out.dtype.element_ty), mask=valid)
        row += ROWS


@triton.jit
def grn_backward_sums_kernel(
    grad, h, bias, offsets, partial_product, partial_grad, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums of grad · GELU(h + bias) and of grad over the part's rows; program (part, group, block of columns)."""
    columns, inside = _columns(BLOCK, WIDTH, tl.program_id(2))
    group, part, parts = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    row, end = _part_of_group(offsets, group, part, parts)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    product = tl.zeros([ROWS, BLOCK], tl.float32)
    plain = tl.zeros([ROWS, BLOCK], tl.float32)
    while row < end:
        at, valid = _tile(row, end, columns, inside, WIDTH, ROWS)
        incoming = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
        product += incoming * _gelu(tl.load(h + at, mask=valid, other=0.0).to(tl.float32) + b)
        plain += incoming
        row += ROWS
    to = (group * parts + part).to(tl.int64) * WIDTH + columns
    tl.store(partial_product + to, tl.sum(product, 0), mask=inside)
    tl.store(partial_grad + to, tl.sum(plain, 0), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def grn_backward_scale_kernel(
    partial_product,
    partial_grad,
    gamma,
    norms,
    scale,  # [G, D], receives the factor of the forward pass again
    pull,  # [G, D], receives the derivative through a channel's norm: dL/dnorm / norm
    grad_gamma,  # [G, D], to be summed over the groups, as is grad_beta
    grad_beta,
    parts,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the sums over a group say about its norms and about gamma and beta."""
    group = tl.program_id(0)
    total = 0.0
    inner = 0.0
    for block in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
        columns, inside = _columns(BLOCK, WIDTH, block)
        at = group.to(tl.int64) * WIDTH + columns
        norm = tl.load(norms + at, mask=inside, other=0.0)
        weight = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
        product = _sum_of_parts(partial_product, group, parts, columns, inside, WIDTH, BLOCK)
        tl.store(pull + at, product, mask=inside)  # read again below
        tl.store(grad_beta + at, _sum_of_parts(partial_grad, group, parts, columns, inside, WIDTH, BLOCK), mask=inside)
        total += tl.sum(norm, 0)
        inner += tl.sum(product * weight * norm, 0)
    tl.debug_barrier()  # what was stored above is read below, maybe by other threads
    mean = total / WIDTH + eps
    for block in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
        columns, inside = _columns(BLOCK, WIDTH, block)
        at = group.to(tl.int64) * WIDTH + columns
        norm = tl.load(norms + at, mask=inside, other=0.0)
        weight = tl.load(gamma + columns, mask=inside, other=0.0).to(tl.float32)
        product = tl.load(pull + at, mask=inside, other=0.0)
        relative = norm / mean
        tl.store(scale + at, 1 + weight * relative, mask=inside)
        tl.store(grad_gamma + at, product * relative, mask=inside)
        of_norm = (product * weight - inner / (mean * WIDTH)) / mean
        alive = norm > 0
        tl.store(pull + at, tl.where(alive, of_norm / tl.where(alive, norm, 1.0), 0.0), mask=inside)


@triton.jit
def grn_backward_apply_kernel(
    grad,  # overwritten with the gradient for h
    h,
    bias,
    scale,
    pull,
    beta,
    offsets,
    out,  # receives the output of the forward pass again
    partial_bias,  # [G, parts, D], float32
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad = (grad · scale + pull · GELU) · GELU'; program (part, group, block of columns)."""
    columns, inside = _columns(BLOCK, WIDTH, tl.program_id(2))
    group, part, parts = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    row, end = _part_of_group(offsets, group, part, parts)
    of_group = group.to(tl.int64) * WIDTH + columns
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    s = tl.load(scale + of_group, mask=inside, other=0.0)[None, :]
    p = tl.load(pull + of_group, mask=inside, other=0.0)[None, :]
    shift = tl.load(beta + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    while row < end:
        at, valid = _tile(row, end, columns, inside, WIDTH, ROWS)
        value, derivative = _gelu_and_derivative(tl.load(h + at, mask=valid, other=0.0).to(tl.float32) + b)
        tl.store(out + at, (value * s + shift).to(out.dtype.element_ty), mask=valid)
        incoming = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
        outgoing = (incoming * s + p * value) * derivative
        tl.store(grad + at, outgoing.to(grad.dtype.element_ty), mask=valid)
        total += tl.where(valid, outgoing, 0.0)
        row += ROWS
    tl.store(partial_bias + (group * parts + part).to(tl.int64) * WIDTH + columns, tl.sum(total, 0), mask=inside)

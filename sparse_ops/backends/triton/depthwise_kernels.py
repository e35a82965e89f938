"""The Triton kernels of the ``triton`` backend. Importing this module imports triton.

Convolution: a program owns one patch and a block of channels, and goes from neighbour to neighbour. Weight gradient:
rows of a program's tensors are (patch, y) pairs and columns are channels; the cells of a line of a patch are separate
tensors in registers, so that a value read once serves up to seven sums.
Everything but the number of patches is known when a kernel is compiled.

Shapes: P patches of SIDE × SIDE cells in Z-order, C channels, K kernel size, ``neighbours`` ``[P, ACROSS²]``.
"""

# ruff: noqa: RUF005  # Triton's language has no starred expressions
from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _z(x):
    """Bits of x moved to the even places, as Z-order wants them: where column x of a patch's first line is stored."""
    return (x & 1) | ((x & 2) << 1) | ((x & 4) << 2)


@triton.constexpr_function
def _along(n, i, o, REACH, SIDE, KERNEL):
    """Line (or column) of taps from cell i of neighbour n to cell o of the patch itself; -1 if beyond the kernel."""
    tap = (n - REACH) * SIDE + i - o + KERNEL // 2
    return tap if 0 <= tap < KERNEL else -1


@triton.constexpr_function
def _reached(n, i, REACH, SIDE, KERNEL):
    """Whether the kernel reaches cell i of neighbour n from any cell of the patch itself."""
    first = (n - REACH) * SIDE + i + KERNEL // 2  # towards the patch's cell 0; the last is SIDE - 1 less
    return first >= 0 and first - (SIDE - 1) < KERNEL


@triton.jit
def _load(at, valid, WHOLE: tl.constexpr):
    """WHOLE tensors need no mask, whose zeros would have to be written to registers first."""
    if WHOLE:
        return tl.load(at).to(tl.float32)
    return tl.load(at, mask=valid, other=0.0).to(tl.float32)


@triton.constexpr_function
def _taps(ny, nx, iy, ix, REACH, SIDE, KERNEL):
    """The tap from cell (iy, ix) of a neighbour to each cell of the patch itself; -1 if beyond the kernel."""
    lines = [_along(ny, iy, oy, REACH, SIDE, KERNEL) for oy in range(SIDE)]
    across = [_along(nx, ix, ox, REACH, SIDE, KERNEL) for ox in range(SIDE)]
    return tuple(y * KERNEL + x if y >= 0 and x >= 0 else -1 for y in lines for x in across)


@triton.jit
def _add_cell(sums, value, held, weight, inside, channels, TAPS: tl.constexpr, WHOLE: tl.constexpr):
    """``sums`` of a patch's cells, with what one cell of a neighbour adds; taps are ``held``, or loaded here."""
    updated = ()
    for o in tl.static_range(len(TAPS)):
        if TAPS[o] < 0:
            updated = updated + (sums[o],)
        elif len(held) > 0:
            updated = updated + (sums[o] + value * held[TAPS[o]],)
        else:
            updated = updated + (sums[o] + value * _load(weight + TAPS[o] * channels, inside, WHOLE),)
    return updated


@triton.jit(do_not_specialize=["patches", "any_channels"])
def depthwise_kernel(
    x,
    weight,  # [K·K + 1, C], float32: the taps, and the bias
    neighbours,
    out,
    patches,
    any_channels,
    CHANNELS: tl.constexpr,  # 0 takes any_channels: one program for every width, with more arithmetic for addresses
    SIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    REACH: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[cell] = bias + sum over taps of weight[tap] · x[cell under the tap].

    A program goes from neighbour to neighbour, and past those that none of its patches has: with one patch a program,
    multiply-adds on masked cells cost nothing. All cells of a patch are summed at once, a tensor each.
    """
    ACROSS: tl.constexpr = 2 * REACH + 1
    AREA: tl.constexpr = SIDE * SIDE
    WHOLE: tl.constexpr = CHANNELS > 0 and CHANNELS % BLOCK_C == 0
    ALL: tl.constexpr = CHANNELS > 0 and CHANNELS % BLOCK_C == 0 and PATCHES == 1
    if CHANNELS > 0:
        channels: tl.constexpr = CHANNELS
    else:
        channels = any_channels
    patch = tl.program_id(0).to(tl.int64) * PATCHES + tl.arange(0, PATCHES)
    live = patch < patches
    columns = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = columns < channels
    bias = _load(weight + KERNEL * KERNEL * channels + columns, inside, WHOLE)
    sums = (tl.zeros([PATCHES, BLOCK_C], tl.float32) + bias,) * AREA
    held = ()
    if SIDE > 2:  # the patch's own cells need each tap, most of them many times; smaller patches need few at once
        for tap in tl.static_range(KERNEL * KERNEL):
            held = held + (_load(weight + tap * channels + columns, inside, WHOLE),)
    for ny in tl.static_range(ACROSS):
        for nx in tl.static_range(ACROSS):
            source = tl.load(neighbours + patch * (ACROSS * ACROSS) + ny * ACROSS + nx, mask=live, other=-1)
            if tl.max(source, 0) >= 0:
                base = x + (source.to(tl.int64) * (AREA * channels))[:, None] + columns
                valid = (source >= 0)[:, None] & inside
                for iy in tl.static_range(SIDE):
                    for ix in tl.static_range(SIDE):
                        if _reached(ny, iy, REACH, SIDE, KERNEL) and _reached(nx, ix, REACH, SIDE, KERNEL):
                            value = _load(base + (2 * _z(iy) + _z(ix)) * channels, valid, ALL)
                            sums = _add_cell(
                                sums,
                                value,
                                held,
                                weight + columns,
                                inside,
                                channels,
                                _taps(ny, nx, iy, ix, REACH, SIDE, KERNEL),
                                WHOLE,
                            )
    own = out + (patch * (AREA * channels))[:, None] + columns
    for oy in tl.static_range(SIDE):
        for ox in tl.static_range(SIDE):
            at = own + (2 * _z(oy) + _z(ox)) * channels
            tl.store(at, sums[oy * SIDE + ox].to(out.dtype.element_ty), mask=live[:, None] & inside)


@triton.jit
def _spread(value):
    """The same for numbers of 0 … 7 that the compiler does not know."""
    return (value & 1) | ((value & 2) << 1) | ((value & 4) << 2)


@triton.jit
def _rows(first, end, SIDE: tl.constexpr, PATCHES: tl.constexpr):
    """Patch, line and validity of each row of a program's tensors, ``[PATCHES · SIDE]``."""
    row = tl.arange(0, PATCHES * SIDE)
    patch = first + row // SIDE
    return patch, row % SIDE, patch < end


@triton.jit
def _line(features, patch, y, channels, SIDE: tl.constexpr):
    """Where line y of each patch begins; its column x is ``_z(x) · channels`` further on."""
    return features + (patch.to(tl.int64) * (SIDE * SIDE) + _spread(y) * 2) * channels


@triton.constexpr_function
def _in_halo(column, HALO, SIDE, KERNEL):
    """Whether taps reach a column of the window of patches; the halo begins at column HALO."""
    return HALO <= column < HALO + SIDE + KERNEL - 1


@triton.constexpr_function
def _any_in_halo(nx, HALO, SIDE, KERNEL):
    """The same for a column of patches."""
    return (nx + 1) * SIDE > HALO and nx * SIDE < HALO + SIDE + KERNEL - 1


@triton.jit
def _load_cell(base, offset, found, columns, inside):
    at = base[:, None] + offset + columns[None, :]
    return tl.load(at, mask=found[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["patches", "any_channels"])
def depthwise_weight_grad_kernel(
    x,
    grad,
    neighbours,
    partial,  # [slices, K·K, C], float32
    patches,
    any_channels,
    CHANNELS: tl.constexpr,  # 0 takes any_channels
    SIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    REACH: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[slice, tap] = sum over the slice's cells of x[cell under the tap] · grad[cell], for one line of taps."""
    RADIUS: tl.constexpr = KERNEL // 2
    ACROSS: tl.constexpr = 2 * REACH + 1
    HALO: tl.constexpr = REACH * SIDE - RADIUS  # column of the window of patches where the halo begins
    if CHANNELS > 0:
        channels: tl.constexpr = CHANNELS
    else:
        channels = any_channels
    length = tl.cdiv(patches, tl.num_programs(0))  # patches of a slice
    first = tl.program_id(0) * length
    end = tl.minimum(first + length, patches)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ky = tl.program_id(2)
    inside = columns < channels
    sums = (tl.zeros([PATCHES * SIDE, BLOCK_C], tl.float32),) * KERNEL
    while first < end:  # the interpreter's `range` takes no number known at run time only
        patch, y, live = _rows(first, end, SIDE, PATCHES)
        own = _line(grad, patch, y, channels, SIDE)
        grads = ()
        for tx in tl.static_range(SIDE):
            grads = grads + (_load_cell(own, _z(tx) * channels, live, columns, inside),)
        line = y + ky - RADIUS + REACH * SIDE
        for nx in tl.static_range(ACROSS):
            if _any_in_halo(nx, HALO, SIDE, KERNEL):
                at = neighbours + patch * (ACROSS * ACROSS) + (line // SIDE) * ACROSS + nx
                source = tl.load(at, mask=live, other=-1)
                base = _line(x, source, line % SIDE, channels, SIDE)
                for lx in tl.static_range(SIDE):
                    if _in_halo(nx * SIDE + lx, HALO, SIDE, KERNEL):
                        value = _load_cell(base, _z(lx) * channels, source >= 0, columns, inside)
                        updated = ()
                        for kx in tl.static_range(KERNEL):
                            if nx * SIDE + lx - HALO - kx >= 0 and nx * SIDE + lx - HALO - kx < SIDE:
                                updated = updated + (sums[kx] + value * grads[nx * SIDE + lx - HALO - kx],)
                            else:
                                updated = updated + (sums[kx],)
                        sums = updated
        first += PATCHES
    for kx in tl.static_range(KERNEL):
        at = partial + (tl.program_id(0) * KERNEL * KERNEL + ky * KERNEL + kx).to(tl.int64) * channels + columns
        tl.store(at, tl.sum(sums[kx], axis=0), mask=inside)

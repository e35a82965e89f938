"""The Triton kernels of the depthwise convolution. Importing this module imports triton.

Convolution: a program owns one patch and a block of channels, and goes from neighbour to neighbour. Weight gradient:
rows of a program's tensors are (patch, y) pairs and columns are channels; the cells of a line of a patch are separate
tensors in registers, so that a value read once serves up to seven sums.
Everything but the number of patches is known when a kernel is compiled: STAGE is a
:class:`~sparse_ops.backends.triton.depthwise.Stage`, whose 0 channels take ``any_channels`` instead.

Shapes: P patches of SIDE × SIDE cells in Z-order, C channels, K kernel size, ``neighbours`` ``[P, ACROSS²]``.
"""

# ruff: noqa: RUF005  # Triton's language has no starred expressions
from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _z(cell, SIDE):
    """Where a cell of a patch, numbered line by line, is stored in Z-order: bits of y and x in turns."""
    y, x = cell // SIDE, cell % SIDE
    return (x & 1) | (y & 1) << 1 | (x & 2) << 1 | (y & 2) << 2 | (x & 4) << 2 | (y & 4) << 3


@triton.constexpr_function
def _taps(ny, nx, cell, STAGE):
    """The tap from a cell of a neighbour to each cell of the patch itself; -1 beyond the kernel, none if all are."""
    _, side, kernel, reach = STAGE
    y = (ny - reach) * side + cell // side + kernel // 2  # line of taps towards the patch's line 0
    x = (nx - reach) * side + cell % side + kernel // 2
    to = [(y - oy, x - ox) for oy in range(side) for ox in range(side)]
    taps = tuple(ty * kernel + tx if 0 <= ty < kernel and 0 <= tx < kernel else -1 for ty, tx in to)
    return taps if max(taps) >= 0 else ()


@triton.jit
def _load(at, valid, WHOLE: tl.constexpr):
    """WHOLE tensors need no mask, whose zeros would have to be written to registers first."""
    if WHOLE:
        return tl.load(at).to(tl.float32)
    return tl.load(at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _add_cell(
    sums, at, valid, held, taps, inside, channels, TAPS: tl.constexpr, ALL: tl.constexpr, WHOLE: tl.constexpr
):
    """``sums`` of a patch's cells, with what the cell ``at`` of a neighbour adds; taps are ``held``, or loaded here."""
    if len(TAPS) > 0:
        value = _load(at, valid, ALL)
        updated = ()
        for o in tl.static_range(len(TAPS)):
            if TAPS[o] < 0:
                updated = updated + (sums[o],)
            elif len(held) > 0:
                updated = updated + (sums[o] + value * held[TAPS[o]],)
            else:
                updated = updated + (sums[o] + value * _load(taps + TAPS[o] * channels, inside, WHOLE),)
        sums = updated
    return sums


@triton.jit(do_not_specialize=["patches", "any_channels"])
def depthwise_kernel(
    x, weight, neighbours, out, patches, any_channels, STAGE: tl.constexpr, PATCHES: tl.constexpr, BLOCK: tl.constexpr
):
    """out[cell] = bias + sum over taps of weight[tap] · x[cell under the tap].

    ``weight`` is ``[K·K + 1, C]``, float32: the taps, and the bias.

    A program goes from neighbour to neighbour, and past those that none of its patches has: with one patch a program,
    multiply-adds on masked cells cost nothing. All cells of a patch are summed at once, a tensor each.
    """
    SIDE: tl.constexpr = STAGE.side
    AREA: tl.constexpr = SIDE * SIDE
    ACROSS: tl.constexpr = 2 * STAGE.reach + 1
    KERNEL_AREA: tl.constexpr = STAGE.kernel_size * STAGE.kernel_size
    WHOLE: tl.constexpr = STAGE.channels > 0 and STAGE.channels % BLOCK == 0
    ALL: tl.constexpr = WHOLE and PATCHES == 1
    channels = STAGE.channels if STAGE.channels > 0 else any_channels
    patch = tl.program_id(0).to(tl.int64) * PATCHES + tl.arange(0, PATCHES)
    live = patch < patches
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = columns < channels
    taps = weight + columns
    sums = (tl.zeros([PATCHES, BLOCK], tl.float32) + _load(taps + KERNEL_AREA * channels, inside, WHOLE),) * AREA
    held = ()
    if SIDE > 2:  # the patch's own cells need each tap, most of them many times; smaller patches need few at once
        for tap in tl.static_range(KERNEL_AREA):
            held = held + (_load(taps + tap * channels, inside, WHOLE),)
    for ny in tl.static_range(ACROSS):
        for nx in tl.static_range(ACROSS):
            source = tl.load(neighbours + patch * (ACROSS * ACROSS) + ny * ACROSS + nx, mask=live, other=-1)
            if tl.max(source, 0) >= 0:
                base = x + (source.to(tl.int64) * (AREA * channels))[:, None] + columns
                valid = (source >= 0)[:, None] & inside
                for cell in tl.static_range(AREA):
                    at = base + _z(cell, SIDE) * channels
                    sums = _add_cell(
                        sums, at, valid, held, taps, inside, channels, _taps(ny, nx, cell, STAGE), ALL, WHOLE
                    )
    own = out + (patch * (AREA * channels))[:, None] + columns
    for cell in tl.static_range(AREA):
        at = own + _z(cell, SIDE) * channels
        tl.store(at, sums[cell].to(out.dtype.element_ty), mask=live[:, None] & inside)


@triton.jit
def _line(features, patch, y, channels, SIDE: tl.constexpr):
    """Where line y of each patch begins; its column x is ``_z(x, SIDE) · channels`` further on."""
    place = ((y & 1) | ((y & 2) << 1) | ((y & 4) << 2)) * 2
    return (features + (patch.to(tl.int64) * (SIDE * SIDE) + place) * channels)[:, None]


@triton.jit(do_not_specialize=["patches", "any_channels"])
def depthwise_weight_grad_kernel(
    x, grad, neighbours, partial, patches, any_channels, STAGE: tl.constexpr, PATCHES: tl.constexpr, BLOCK: tl.constexpr
):
    """partial[slice, tap] = sum over the slice's cells of x[cell under the tap] · grad[cell], for one line of taps.

    ``partial`` is ``[slices, K·K, C]``, float32; program (slice, block of channels, line of taps).
    """
    SIDE: tl.constexpr = STAGE.side
    KERNEL: tl.constexpr = STAGE.kernel_size
    ACROSS: tl.constexpr = 2 * STAGE.reach + 1
    HALO: tl.constexpr = STAGE.reach * SIDE - KERNEL // 2  # line and column of the window of patches where it begins
    channels = STAGE.channels if STAGE.channels > 0 else any_channels
    length = tl.cdiv(patches, tl.num_programs(0))  # patches of a slice
    first = tl.program_id(0) * length
    end = tl.minimum(first + length, patches)
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    ky = tl.program_id(2)
    inside = columns < channels
    sums = (tl.zeros([PATCHES * SIDE, BLOCK], tl.float32),) * KERNEL
    while first < end:  # the interpreter's `range` takes no number known at run time only
        row = tl.arange(0, PATCHES * SIDE)
        patch, y = first + row // SIDE, row % SIDE
        live = patch < end
        own = _line(grad, patch, y, channels, SIDE)
        grads = ()
        for tx in tl.static_range(SIDE):
            grads = grads + (_load(own + _z(tx, SIDE) * channels + columns, live[:, None] & inside, False),)
        line = y + ky + HALO
        for column in tl.static_range(SIDE + KERNEL - 1):  # of the halo
            if column == 0 or (HALO + column) % SIDE == 0:  # the first in its patch
                at = neighbours + patch * (ACROSS * ACROSS) + (line // SIDE) * ACROSS + (HALO + column) // SIDE
                source = tl.load(at, mask=live, other=-1)
                base = _line(x, source, line % SIDE, channels, SIDE)
            at = base + _z((HALO + column) % SIDE, SIDE) * channels + columns
            value = _load(at, (source >= 0)[:, None] & inside, False)
            updated = ()
            for kx in tl.static_range(KERNEL):
                if kx <= column and column < kx + SIDE:
                    updated = updated + (sums[kx] + value * grads[column - kx],)
                else:
                    updated = updated + (sums[kx],)
            sums = updated
        first += PATCHES
    for kx in tl.static_range(KERNEL):
        tap = tl.program_id(0) * KERNEL * KERNEL + ky * KERNEL + kx
        tl.store(partial + tap.to(tl.int64) * channels + columns, tl.sum(sums[kx], axis=0)[None, :], mask=inside)

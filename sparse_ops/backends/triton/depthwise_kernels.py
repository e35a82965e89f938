"""The Triton kernels of the depthwise convolution. Importing this module imports triton.

The convolution and its weight gradient mirror each other. A program takes a slice of the patches and a block of
channels, one patch after the other. For each it goes from neighbour to neighbour and reads a line of cells at a time,
and each value meets whatever it has to: the convolution holds the taps and sums the cells of the patch, the weight
gradient holds the gradients of the cells and sums the taps. Values, what is held and sums are tensors ``[PATCHES,
BLOCK]`` in registers, one for each cell or tap.
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
def _columns(neighbour, line, STAGE):
    """The columns of a line of a neighbour that a tap reaches from the patch itself."""
    _, side, kernel, reach = STAGE
    ny, nx, half = neighbour // (2 * reach + 1) - reach, neighbour % (2 * reach + 1) - reach, kernel // 2
    if not -half <= ny * side + line < side + half:
        return ()
    return tuple(column for column in range(side) if -half <= nx * side + column < side + half)


@triton.constexpr_function
def _products(neighbour, line, STAGE, OF_TAPS):
    """What is added to each sum: a place in :func:`_columns`, a tap, and so on; with OF_TAPS sums are those of the
    taps, and there are cells of the patch in place of taps."""
    _, side, kernel, reach = STAGE
    size, other = (kernel, side) if OF_TAPS else (side, kernel)
    y = (neighbour // (2 * reach + 1) - reach) * side + line + kernel // 2  # the line of a cell and of its tap, added
    x = [
        (neighbour % (2 * reach + 1) - reach) * side + column + kernel // 2
        for column in _columns(neighbour, line, STAGE)
    ]
    return tuple(
        tuple(
            number
            for place, sum_x in enumerate(x)
            if 0 <= y - sy < other and 0 <= sum_x - sx < other
            for number in (place, (y - sy) * other + sum_x - sx)
        )
        for sy in range(size)
        for sx in range(size)
    )


@triton.jit
def _load(at, valid, WHOLE: tl.constexpr):
    """WHOLE tensors need no mask, whose zeros would have to be written to registers first."""
    if WHOLE:
        return tl.load(at).to(tl.float32)
    return tl.load(at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _add_neighbour(
    sums, held, base, valid, channels, NEIGHBOUR: tl.constexpr, STAGE: tl.constexpr, OF_TAPS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """``sums`` with the products of a neighbour's values and of what is ``held``."""
    SIDE: tl.constexpr = STAGE.side
    for line in tl.static_range(SIDE):
        at = base + _z(line * SIDE, SIDE) * channels
        sums = _add_line(
            sums, held, at, valid, channels, _columns(NEIGHBOUR, line, STAGE),
            _products(NEIGHBOUR, line, STAGE, OF_TAPS), SIDE, WHOLE,
        )  # fmt: skip
    return sums


@triton.jit
def _add_line(
    sums, held, line, valid, channels, COLUMNS: tl.constexpr, PRODUCTS: tl.constexpr, SIDE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    if len(COLUMNS) > 0:
        values = ()
        for place in tl.static_range(len(COLUMNS)):
            values = values + (_load(line + _z(COLUMNS[place], SIDE) * channels, valid, WHOLE),)
        updated = ()
        for index in tl.static_range(len(PRODUCTS)):
            total = sums[index]
            for i in tl.static_range(0, len(PRODUCTS[index]), 2):
                total = tl.fma(values[PRODUCTS[index][i]], held[PRODUCTS[index][i + 1]], total)
            updated = updated + (total,)
        sums = updated
    return sums


@triton.jit
def _add_neighbours(
    sums, held, x, neighbours, patch, live, columns, inside, channels, STAGE: tl.constexpr, OF_TAPS: tl.constexpr,
    PATCHES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``sums`` with the products of all neighbours, the patch itself among them.

    A program goes past large neighbours that none of its patches has. Small ones are read under masks, all at once:
    there are few loads for each, and to wait for them one by one takes longer than to multiply zeros.
    """
    SIDE: tl.constexpr = STAGE.side
    ALL: tl.constexpr = WHOLE and PATCHES == 1
    AROUND: tl.constexpr = (2 * STAGE.reach + 1) * (2 * STAGE.reach + 1)
    sources = ()
    for neighbour in tl.static_range(AROUND):
        at = neighbours + patch * AROUND + neighbour
        sources = sources + (tl.load(at),) if PATCHES == 1 else sources + (tl.load(at, mask=live, other=-1),)
    for neighbour in tl.static_range(AROUND):
        source = sources[neighbour]
        base = x + (source.to(tl.int64) * (SIDE * SIDE * channels))[:, None] + columns
        valid = (source >= 0)[:, None] & inside
        if SIDE > 2:
            if tl.max(source, 0) >= 0:
                sums = _add_neighbour(sums, held, base, valid, channels, neighbour, STAGE, OF_TAPS, ALL)
        else:
            sums = _add_neighbour(sums, held, base, valid, channels, neighbour, STAGE, OF_TAPS, False)
    return sums


@triton.jit(do_not_specialize=["patches", "length", "any_channels", "first_tap", "tap_step", "has_bias"])
def depthwise_kernel(
    x, weight, bias, add, neighbours, out, patches, length, first_tap, tap_step, has_bias, any_channels,
    STAGE: tl.constexpr, PATCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[cell] = bias + sum over taps of weight[tap] · x[cell under the tap], + add[cell] unless that is None.

    ``weight`` is ``[C, K·K]``; tap t is its column ``first_tap + t · tap_step``, so that the gradient for x, whose taps
    are reversed, takes the same kernel. ``length`` patches a program.
    """
    AREA: tl.constexpr = STAGE.side * STAGE.side
    TAPS: tl.constexpr = STAGE.kernel_size * STAGE.kernel_size
    WHOLE: tl.constexpr = STAGE.channels > 0 and STAGE.channels % BLOCK == 0
    channels = STAGE.channels if STAGE.channels > 0 else any_channels
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = columns < channels
    tap = weight + columns * TAPS + first_tap
    taps = ()
    for _ in tl.static_range(TAPS):
        taps = taps + (_load(tap, inside, WHOLE),)
        tap += tap_step
    start = tl.load(bias + columns, mask=inside & (has_bias != 0), other=0.0).to(tl.float32)
    first = tl.program_id(0) * length
    end = tl.minimum(first + length, patches)
    while first < end:  # the interpreter's `range` takes no number known at run time only
        patch = first.to(tl.int64) + tl.arange(0, PATCHES)
        live = patch < end
        sums = (tl.zeros([PATCHES, BLOCK], tl.float32) + start,) * AREA
        sums = _add_neighbours(
            sums, taps, x, neighbours, patch, live, columns, inside, channels, STAGE, False, PATCHES, WHOLE
        )
        own = (patch * (AREA * channels))[:, None] + columns
        written = live[:, None] & inside
        for cell in tl.static_range(AREA):
            at = own + _z(cell, STAGE.side) * channels
            total = sums[cell]
            if add is not None:
                total += tl.load(add + at, mask=written, other=0.0).to(tl.float32)
            tl.store(out + at, total.to(out.dtype.element_ty), mask=written)
        first += PATCHES


@triton.jit(do_not_specialize=["patches", "length", "any_channels"])
def depthwise_weight_grad_kernel(
    x, grad, neighbours, partial, patches, length, any_channels, STAGE: tl.constexpr, PATCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[slice, tap] = sum over the slice's cells of x[cell under the tap] · grad[cell]; after the taps, of grad.

    ``partial`` is ``[slices, K·K + 1, C]``, float32. ``length`` patches a slice.
    """
    AREA: tl.constexpr = STAGE.side * STAGE.side
    TAPS: tl.constexpr = STAGE.kernel_size * STAGE.kernel_size
    WHOLE: tl.constexpr = STAGE.channels > 0 and STAGE.channels % BLOCK == 0
    channels = STAGE.channels if STAGE.channels > 0 else any_channels
    columns = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = columns < channels
    sums = (tl.zeros([PATCHES, BLOCK], tl.float32),) * TAPS
    own_sum = tl.zeros([PATCHES, BLOCK], tl.float32)
    first = tl.program_id(0) * length
    end = tl.minimum(first + length, patches)
    while first < end:
        patch = first.to(tl.int64) + tl.arange(0, PATCHES)
        live = patch < end
        own = grad + (patch * (AREA * channels))[:, None] + columns
        grads = ()
        for cell in tl.static_range(AREA):
            value = _load(own + _z(cell, STAGE.side) * channels, live[:, None] & inside, WHOLE and PATCHES == 1)
            grads = grads + (value,)
            own_sum += value
        sums = _add_neighbours(
            sums, grads, x, neighbours, patch, live, columns, inside, channels, STAGE, True, PATCHES, WHOLE
        )
        first += PATCHES
    at = partial + (tl.program_id(0) * (TAPS + 1)).to(tl.int64) * channels + columns
    for tap in tl.static_range(TAPS):
        tl.store(at + tap * channels, tl.sum(sums[tap], 0)[None, :], mask=inside)
    tl.store(at + TAPS * channels, tl.sum(own_sum, 0)[None, :], mask=inside)

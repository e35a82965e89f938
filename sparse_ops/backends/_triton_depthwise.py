"""The Triton kernels of the ``triton`` backend. Importing this module imports triton.

A program owns a few patches and a block of channels. Rows of its tensors are (patch, y) pairs and columns are channels;
the cells of a line of a patch are separate tensors in registers, so that a value read once serves up to seven sums.
Everything but the number of patches is known when a kernel is compiled.

Shapes: P patches of SIDE × SIDE cells in Z-order, C channels, K kernel size, ``neighbours`` ``[P, ACROSS²]``.
"""

# ruff: noqa: RUF005  # Triton's language has no starred expressions
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _spread(value):
    """Bits of 0 … 7 moved to the even places, as Z-order wants x."""
    return (value & 1) | ((value & 2) << 1) | ((value & 4) << 2)


@triton.constexpr_function
def _z(x):
    """The same for a number known to the compiler: where column x of a line begins within its patch."""
    return (x & 1) | ((x & 2) << 1) | ((x & 4) << 2)


@triton.jit
def _rows(first, end, SIDE: tl.constexpr, PATCHES: tl.constexpr):
    """Patch, line and validity of each row of a program's tensors, ``[PATCHES · SIDE]``."""
    row = tl.arange(0, PATCHES * SIDE)
    patch = first + row // SIDE
    return patch, row % SIDE, patch < end


@triton.jit
def _line(features, patch, y, SIDE: tl.constexpr, CHANNELS: tl.constexpr):
    """Where line y of each patch begins; its column x is ``_z(x) · CHANNELS`` further on."""
    return features + (patch.to(tl.int64) * (SIDE * SIDE) + _spread(y) * 2) * CHANNELS


@triton.constexpr_function
def _in_halo(column, HALO, SIDE, KERNEL):
    """Whether taps reach a column of the window of patches; the halo begins at column HALO."""
    return HALO <= column < HALO + SIDE + KERNEL - 1


@triton.constexpr_function
def _any_in_halo(nx, HALO, SIDE, KERNEL):
    """The same for a column of patches."""
    return (nx + 1) * SIDE > HALO and nx * SIDE < HALO + SIDE + KERNEL - 1


@triton.jit
def _load_cell(base, offset: tl.constexpr, found, columns, inside):
    return tl.load(base[:, None] + offset + columns[None, :], mask=found[:, None] & inside[None, :], other=0.0)


@triton.jit(do_not_specialize=["patches"])
def depthwise_kernel(
    x,
    weight,  # [K·K, C], float32
    bias,  # [C], float32
    neighbours,
    out,
    patches,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    REACH: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[cell] = bias + sum over taps of weight[tap] · x[cell under the tap]."""
    RADIUS: tl.constexpr = KERNEL // 2
    ACROSS: tl.constexpr = 2 * REACH + 1
    HALO: tl.constexpr = REACH * SIDE - RADIUS  # column of the window of patches where the halo begins
    patch, y, live = _rows(tl.program_id(0) * PATCHES, patches, SIDE, PATCHES)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < CHANNELS
    start = tl.zeros([PATCHES * SIDE, BLOCK_C], tl.float32)
    if HAS_BIAS:
        start += tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    sums = (start,) * SIDE
    table = neighbours + patch * (ACROSS * ACROSS)
    for ky in range(KERNEL):  # a loop of the program: unrolled, it would take a minute to compile
        taps = ()
        for kx in tl.static_range(KERNEL):
            tap = ky * KERNEL + kx
            if REVERSE:
                tap = KERNEL * KERNEL - 1 - tap
            taps = taps + (tl.load(weight + tap * CHANNELS + columns, mask=inside, other=0.0)[None, :],)
        line = y + (ky - RADIUS + REACH * SIDE)
        for nx in tl.static_range(ACROSS):
            if _any_in_halo(nx, HALO, SIDE, KERNEL):
                source = tl.load(table + (line // SIDE) * ACROSS + nx, mask=live, other=-1)
                base = _line(x, source, line % SIDE, SIDE, CHANNELS)
                for lx in tl.static_range(SIDE):
                    if _in_halo(nx * SIDE + lx, HALO, SIDE, KERNEL):
                        value = _load_cell(base, _z(lx) * CHANNELS, source >= 0, columns, inside).to(tl.float32)
                        updated = ()
                        for tx in tl.static_range(SIDE):
                            if nx * SIDE + lx - HALO - tx >= 0 and nx * SIDE + lx - HALO - tx < KERNEL:
                                updated = updated + (sums[tx] + value * taps[nx * SIDE + lx - HALO - tx],)
                            else:
                                updated = updated + (sums[tx],)
                        sums = updated
    own = _line(out, patch, y, SIDE, CHANNELS)
    for tx in tl.static_range(SIDE):
        at = own[:, None] + _z(tx) * CHANNELS + columns[None, :]
        tl.store(at, sums[tx].to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["patches"])
def depthwise_weight_grad_kernel(
    x,
    grad,
    neighbours,
    partial,  # [slices, K·K, C], float32
    patches,
    CHANNELS: tl.constexpr,
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
    length = tl.cdiv(patches, tl.num_programs(0))  # patches of a slice
    first = tl.program_id(0) * length
    end = tl.minimum(first + length, patches)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ky = tl.program_id(2)
    inside = columns < CHANNELS
    sums = (tl.zeros([PATCHES * SIDE, BLOCK_C], tl.float32),) * KERNEL
    while first < end:  # the interpreter's `range` takes no number known at run time only
        patch, y, live = _rows(first, end, SIDE, PATCHES)
        own = _line(grad, patch, y, SIDE, CHANNELS)
        grads = ()
        for tx in tl.static_range(SIDE):
            grads = grads + (_load_cell(own, _z(tx) * CHANNELS, live, columns, inside).to(tl.float32),)
        line = y + ky - RADIUS + REACH * SIDE
        for nx in tl.static_range(ACROSS):
            if _any_in_halo(nx, HALO, SIDE, KERNEL):
                at = neighbours + patch * (ACROSS * ACROSS) + (line // SIDE) * ACROSS + nx
                source = tl.load(at, mask=live, other=-1)
                base = _line(x, source, line % SIDE, SIDE, CHANNELS)
                for lx in tl.static_range(SIDE):
                    if _in_halo(nx * SIDE + lx, HALO, SIDE, KERNEL):
                        value = _load_cell(base, _z(lx) * CHANNELS, source >= 0, columns, inside).to(tl.float32)
                        updated = ()
                        for kx in tl.static_range(KERNEL):
                            if nx * SIDE + lx - HALO - kx >= 0 and nx * SIDE + lx - HALO - kx < SIDE:
                                updated = updated + (sums[kx] + value * grads[nx * SIDE + lx - HALO - kx],)
                            else:
                                updated = updated + (sums[kx],)
                        sums = updated
        first += PATCHES
    for kx in tl.static_range(KERNEL):
        at = partial + (tl.program_id(0) * KERNEL * KERNEL + ky * KERNEL + kx).to(tl.int64) * CHANNELS + columns
        tl.store(at, tl.sum(sums[kx], axis=0), mask=inside)

"""The sum of the slices of a weight gradient, in one launch and straight into the parameters' layout and dtype.
Importing this module imports triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slices", "channels"])
def depthwise_sum_kernel(
    partial, grad_weight, grad_bias, slices, channels, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums ``partial`` over its slices into ``grad_weight`` ``[C, K·K]`` and ``grad_bias`` ``[C]``; a tap a program."""
    tap = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < channels
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    first = 0
    while first < slices:
        row = first + tl.arange(0, ROWS)
        at = partial + (row.to(tl.int64) * (TAPS + 1) + tap)[:, None] * channels + columns[None, :]
        sums += tl.load(at, mask=(row < slices)[:, None] & inside[None, :], other=0.0)
        first += ROWS
    total = tl.sum(sums, 0)
    if tap < TAPS:
        tl.store(grad_weight + columns * TAPS + tap, total.to(grad_weight.dtype.element_ty), mask=inside)
    else:
        tl.store(grad_bias + columns, total.to(grad_bias.dtype.element_ty), mask=inside)

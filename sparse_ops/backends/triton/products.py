"""Matrix products whose sums stay in float32, the results' dtype being another matter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_REDUCED = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@contextlib.contextmanager
def full_precision_sums() -> Iterator[None]:
    """cuBLAS adds up the parts of a product of 16 bits in float32 here, which torch leaves to it by default.

    torch's switches are the process's, so they are put back at once: a library changes no setting of its user's.
    """
    switches = torch.backends.cuda.matmul
    before = {}
    for name in _REDUCED:
        if getattr(switches, name):
            before[name] = True, getattr(switches, f"{name}_split_k")
            setattr(switches, name, (False, before[name][1]))
    accumulated, switches.allow_fp16_accumulation = switches.allow_fp16_accumulation, False
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(switches, name, value)
        switches.allow_fp16_accumulation = accumulated


def projected(bias: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = bias + a @ b``, all of one dtype."""
    with full_precision_sums():
        torch.addmm(bias, a, b, out=out)


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """``a @ b`` in ``dtype``, by default their own: without a rounding to 16 bits in between if it is float32."""
    with full_precision_sums():
        if dtype in (None, a.dtype):
            return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else _widened_product(None, a, b, dtype)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``, where ``out`` may be float32 and the others have 16 bits."""
    with full_precision_sums():
        if out.dtype == a.dtype:
            out.addmm_(a, b)
        elif a.is_cuda:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            _widened_product(out, a, b, out.dtype)


def _widened_product(out: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """What cuBLAS does in one launch, where there is no such product: in the interpreter."""
    a, b = a.to(dtype), b.to(dtype)
    return torch.mm(a, b) if out is None else out.addmm_(a, b)

"""Launching kernels, or only compiling them."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

PROGRAMS = 2048
"""About how many programs work is cut into: some for each multiprocessor of any GPU. A constant, so that
the order of the sum, and with it the last bits, depend on the shapes alone."""


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_only_compiling = False
"""Whether kernels are compiled where they would be launched."""


@contextlib.contextmanager
def only_compiling() -> Iterator[None]:
    """Kernels are compiled here, side by side, and not launched: operators return memory as it was.

    All of it is compiled when the context ends, and launched without delay from then on.
    """
    global _only_compiling
    from triton import AsyncCompileMode

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads, AsyncCompileMode(threads):
        before, _only_compiling = _only_compiling, True
        try:
            yield
        finally:
            _only_compiling = before


def launch(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
    """Launch on the device of the first argument."""
    with torch.cuda.device(args[0].device) if args[0].is_cuda else contextlib.nullcontext():
        if _only_compiling:
            kernel.warmup(*args, grid=(1,), **constants)
        else:
            kernel[grid](*args, **constants)


@cache
def kernels_of(half: str) -> Any:
    """The module of kernels of a ``half`` of the block, which imports triton."""
    return importlib.import_module(f"sparse_ops.backends.triton.{half}_kernels")

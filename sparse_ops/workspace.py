"""Memory for the temporaries of a pass."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class Workspace:
    """Buffers that layers take in turn instead of allocating their own.

    An allocator that gives large blocks back to the system makes each fresh temporary cost a page fault every 4 KiB,
    which on the wide hidden layers takes longer than the arithmetic. A workspace belongs to one pass (it lives on the
    active set), so nothing outlasts the pass; each thread has buffers of its own.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, str, torch.dtype, torch.device], Tensor] = {}

    def take(self, slot: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of ``shape``, with dtype and device of ``like``.

        It shares memory with every other tensor taken from the same ``slot`` by this thread: use it before the next
        one is taken, and never return or save it.
        """
        if torch.compiler.is_compiling():
            return like.new_empty(shape)  # the compiler plans memory itself
        size = math.prod(shape)
        key = threading.get_ident(), slot, like.dtype, like.device
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = like.new_empty(size)
        return buffer[:size].view(shape)

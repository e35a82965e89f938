"""Handlers of signals, put in place from the main thread, which alone gets signals, and taken back again."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

AT_ONCE = 1.0
"""Seconds in which a signal that comes again is the same one: launchers pass on what processes were sent already."""


class Handlers:
    """Those that were there before ours, and when signals came first."""

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._since: dict[int, float] = {}

    def turn(self, handler: Callable[[int, FrameType | None], Any] | signal.Handlers, *names: str) -> None:
        """Have signals, as far as the system has them, go to ``handler``."""
        if threading.current_thread() is threading.main_thread():
            for signum in [getattr(signal, name) for name in names if hasattr(signal, name)]:
                self._previous[signum] = signal.signal(signum, handler)

    def is_first(self, signum: int) -> bool:
        """Whether a signal that came now is the first of its number, or comes with it."""
        now = time.monotonic()
        return now - self._since.setdefault(signum, now) < AT_ONCE

    def act(self, signum: int) -> None:
        """What the signal would have done."""
        self._restore(signum)
        signal.raise_signal(signum)

    def restore(self) -> None:
        """Put back what was there before."""
        for signum in self._previous:
            self._restore(signum)

    def _restore(self, signum: int) -> None:
        handler = self._previous[signum]
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: not set from Python


@contextlib.contextmanager
def ignored(*names: str) -> Iterator[None]:
    """Inside of the block these signals do nothing, unless another handler is put in place."""
    handlers = Handlers()
    handlers.turn(signal.SIG_IGN, *names)
    try:
        yield
    finally:
        handlers.restore()

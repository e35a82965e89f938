"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class RunStoppedError(Exception):
    """A signal asked the run to stop, and it did between two steps; ``status`` is the exit status to end with."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.status = 128 + signum


class StopSignals:
    """Turns SIGINT and SIGTERM into a request to stop the run in ``output`` between two steps; a second acts now."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others get no signals
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        signal.signal(signum, self._previous[signum])

    def check(self, epoch: int) -> None:
        """Raise RunStoppedError if a signal came; ``epoch`` epochs have been saved."""
        if self._received is None:
            return
        name = signal.Signals(self._received).name
        saved = f"{epoch} epochs are saved, continue with `resume`" if epoch else "no epoch had been finished"
        raise RunStoppedError(self._received, f"stopped by {name}; {saved}: {self._output}")

"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from convnextv2.training.handlers import Handlers

SAVE = 1
"""Asks for a state to be saved; higher numbers, those of a signal and this, for that and to stop."""


class RunStoppedError(Exception):
    """A signal asked the run to stop, and it did between two steps; ``status`` is the exit status to end with."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.status = 128 + signum


class StopSignals:
    """Turns SIGINT and SIGTERM into a request to save and stop between two steps, of which a second acts now, and
    SIGUSR1 into one to save and go on: ``asked``, 0 or more than :data:`SAVE`, and ``save``."""

    def __init__(self) -> None:
        self.asked, self.save = 0, False
        self._handlers = Handlers()

    def __enter__(self) -> StopSignals:
        self._handlers.turn(self._receive, "SIGINT", "SIGTERM", "SIGUSR1")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handlers.restore()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum not in (signal.SIGINT, signal.SIGTERM):
            self.save = True
        elif self._handlers.is_first(signum):
            self.asked = signum + SAVE
        else:
            self._handlers.act(signum)


def stopped(asked: int, saved: str, output: Path) -> RunStoppedError:
    """What a run ends with that was asked to stop; ``saved`` says what is, or is empty."""
    signum = asked - SAVE
    told = f"{saved}, continue with `resume`" if saved else "nothing had been saved"
    return RunStoppedError(signum, f"stopped by {signal.Signals(signum).name}; {told}: {output}")

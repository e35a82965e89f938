"""What a run tells its user, and when."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from convnextv2.data.sources import describe_skipped

Log = Callable[[str], None]
ProgressBar = Callable[[Iterable[Any], int, str], Iterable[Any]]


def silent(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """A progress bar that shows nothing."""
    return items


class Occasionally:
    """True at most once in ``seconds``: for pictures, which may take longer than a short epoch."""

    def __init__(self, seconds: float = 15.0) -> None:
        self.seconds = seconds
        self._last = -math.inf

    def __call__(self, certainly: bool = False) -> bool:
        """Whether it is time again; ``certainly`` makes it so."""
        now = time.monotonic()
        due = certainly or now - self._last >= self.seconds
        if due:
            self._last = now
        return due


def resuming(done: int, epochs: int) -> str:
    """A line on where a resumed run stands."""
    return f"resuming after epoch {done}" if done < epochs else f"nothing to do: {done} epochs are done; raise --epochs"


def say_skipped(skipped: Sequence[tuple[Path, str]], log: Log, shown: int = 5) -> None:
    """Tell how many files were left out, and why, naming the first ``shown``; in one line."""
    if skipped:
        heading, *named = describe_skipped(skipped, shown)
        log(f"{heading} {'; '.join(named)}")


def every(interval: int | None, epochs: int, default_count: int = 5) -> set[int]:
    """Epochs (from 1) at which something is due: each ``interval``-th and the last; None about ``default_count`` times,
    0 never."""
    if interval == 0:
        return set()
    step = interval or max(1, math.ceil(epochs / default_count))
    return {*range(step, epochs + 1, step), epochs}

"""What a run tells its user, and when."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from convnextv2.data.sources import describe_skipped

T = TypeVar("T")
Log = Callable[[str], None]
ProgressBar = Callable[[Iterable[Any], int, str], Iterable[Any]]
logger = logging.getLogger("convnextv2.training")


def reporters(log: Log | None, progress: ProgressBar | None) -> tuple[Log, ProgressBar]:
    """``log`` and ``progress``, or what suits the place: in a notebook and on a terminal lines and a bar, elsewhere
    lines to ``logging`` and no bar."""
    notebook = _in_notebook()
    shown = notebook or sys.stderr.isatty()

    def write(line: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(line, file=sys.stdout if notebook else sys.stderr)  # notebooks paint stderr red

    return log or (write if shown else logger.info), progress or (Bar if shown else silent)


def _in_notebook() -> bool:
    """Whether this process is an IPython kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def silent(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """A progress bar that shows nothing."""
    return items


class Bar(Generic[T]):
    """A progress bar: a widget in a notebook, text elsewhere.

    Args:
        items: what to iterate over.
        total: number of items, if it is known.
        description: what is going on.
    """

    def __init__(self, items: Iterable[T], total: int | None = None, description: str = "") -> None:
        self._items = items
        self._total = total
        self._description = description
        self._note = ""

    def note(self, text: str) -> None:
        """Text to show behind the count, such as the current loss."""
        self._note = text

    def __iter__(self) -> Iterator[T]:
        from tqdm.auto import tqdm

        with tqdm(total=self._total, desc=self._description, leave=False, dynamic_ncols=True) as bar:
            for item in self._items:
                yield item
                bar.set_postfix_str(self._note, refresh=False)
                bar.update()


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

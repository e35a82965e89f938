"""What a run tells its user."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

Log = Callable[[str], None]
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
logger = logging.getLogger("convnextv2.training")


def reporters(log: Log | None, progress: Progress | None) -> tuple[Log, Progress]:
    """``log`` and ``progress``, or what suits the place: in a notebook and on a terminal lines and a bar, elsewhere
    lines to ``logging`` and no bar."""
    ipython = sys.modules.get("IPython")
    notebook = ipython is not None and hasattr(ipython.get_ipython(), "kernel")
    shown = notebook or sys.stderr.isatty()

    def write(line: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(line, file=sys.stdout if notebook else sys.stderr)  # notebooks paint stderr red

    return log or (write if shown else logger.info), progress or (bar if shown else lambda items, total, text: items)


def bar(items: Iterable[Any], total: int | None, description: str) -> Any:
    """``items`` in tqdm's progress bar: a widget in a notebook, text elsewhere."""
    from tqdm.auto import tqdm

    return tqdm(items, description, total, leave=False, dynamic_ncols=True)

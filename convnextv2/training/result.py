"""What a run returns: its folder, its metrics, its network."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn


class Metrics(list[dict[str, Any]]):
    """The rows of ``metrics.jsonl``, a mapping an epoch: shows itself as a table; ``pandas.DataFrame`` takes it."""

    def _cells(self) -> list[list[str]]:
        names = dict.fromkeys(name for row in self for name in row)
        return [[*names], *([_text(row.get(name)) for name in names] for row in self)]

    def __repr__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)

    def _repr_html_(self) -> str:
        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        names, *rows = self._cells()
        body = "".join(line(row, "td") for row in rows)
        return f"<table><thead>{line(names, 'th')}</thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run came to.

    Args:
        folder: of the run.
        epochs: done so far, in this session and those it continued.
        images: in each part of the data, the one trained on first.
        best: record and epoch of the best evaluation; None where nothing is evaluated.
        metrics: of all epochs.
        model: the network with the weights that ``folder`` stands for: the best ones where epochs are evaluated, else
            the last, averaged where the run averages; in evaluation mode, on the device of the run.
    """

    folder: Path
    epochs: int
    images: tuple[int, ...]
    best: dict[str, float] | None
    metrics: Metrics = field(repr=False)
    model: nn.Module = field(repr=False)


@dataclass(frozen=True, eq=False)
class ValidatedResult(RunResult):
    """What a run came to that validates every epoch; ``model`` is the network of the best one."""

    best: dict[str, float]

    @property
    def best_epoch(self) -> int:
        """Its epoch, from 1."""
        return int(self.best["epoch"])

    @property
    def val_images(self) -> int:
        """Images validated on."""
        return self.images[1]

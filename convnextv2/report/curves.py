"""Columns of the metrics as plots: which belong together, what they are called, and where their lines run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from convnextv2.messages import one_line
from convnextv2.report.runs import Run

Points = list[tuple[int, float | None]]
"""Epochs and numbers; None leaves a gap."""
WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 350, 12, 182
"""Of the frame in a plot, in its own units, which are about a pixel on a phone."""
MOST_POINTS = 400
"""Of a line; longer ones keep the smallest and the largest of neighbouring numbers."""
MARKED = 40
"""Points of a line up to which each is marked."""
GROUPS = ("Loss", "Accuracy", "Features", "Optimization", "Speed and memory", "Other")
NOT_DRAWN = ("epoch", "step")
LABELS = (  # pattern of the column, group, label, unit, factor
    (r"loss", "Loss", "reconstruction loss", "", 1),
    (r"train_loss", "Loss", "training loss", "", 1),
    (r"val_loss", "Loss", "validation loss", "", 1),
    (r"val_top(\d+)", "Accuracy", r"validation, top-\1", "%", 1),
    (r"knn_top(\d+)", "Accuracy", r"nearest neighbours, top-\1", "%", 1),
    (r"linear_top(\d+)", "Accuracy", r"linear classifier, top-\1", "%", 1),
    (r"val_miou", "Accuracy", "validation, mIoU", "%", 1),
    (r"val_accuracy", "Accuracy", "validation, right pixels", "%", 1),
    (r"feature_diversity", "Features", "feature diversity", "", 1),
    (r"feature_diversity_(\d+)", "Features", r"feature diversity, stage \1", "", 1),
    (r"lr", "Optimization", "learning rate", "", 1),
    (r"gradient_norm", "Optimization", "norm of the gradient", "", 1),
    (r"weight_norm", "Optimization", "norm of the weights", "", 1),
    (r"images_per_s", "Speed and memory", "images a second", "", 1),
    (r"data_wait", "Speed and memory", "waiting for data", "%", 100),
    (r"seconds", "Speed and memory", "time of an epoch", "s", 1),
    (r"probe_seconds", "Speed and memory", "time of the probes", "s", 1),
    (r"(\w+)_seconds", "Speed and memory", r"time of \1", "s", 1),
    (r"memory_mib", "Speed and memory", "peak memory", "MiB", 1),
    (r"(\w*memory)(?:_mib)", "Speed and memory", r"\1", "MiB", 1),
    (r"(\w*memory)(?:_gib)", "Speed and memory", r"\1", "GiB", 1),
    (r"(\w*memory)(?:_bytes)?", "Speed and memory", r"\1", "MiB", 2**-20),
    (r"(\w*loss)", "Loss", r"\1", "", 1),
    (r"(\w*)top(\d+)", "Accuracy", r"\1 top-\2", "%", 1),
)


@dataclass(frozen=True)
class Line:
    """A run in a plot: ``path`` for SVG, and the marks ``(x, y, text)`` of single points."""

    run: int
    path: str
    marks: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Plot:
    """A column of all runs that have it.

    Args:
        column: its name in ``metrics.jsonl``.
        group: of :data:`GROUPS`.
        label, unit: for people.
        names: of all runs of the report.
        points: of each run, in ``unit``; empty for runs without the column.
    """

    column: str
    group: str
    label: str
    unit: str
    names: tuple[str, ...]
    points: tuple[Points, ...]

    @cached_property
    def changes(self) -> bool:
        """Whether there is anything to see."""
        return len({value for _, value in self._drawn}) > 1

    @property
    def _drawn(self) -> list[tuple[int, float]]:
        return [(epoch, value) for points in self.points for epoch, value in points if value is not None]

    @cached_property
    def x(self) -> tuple[float, float]:
        """Epochs at the ends of the frame."""
        epochs = [epoch for epoch, _ in self._drawn]
        low, high = min(epochs), max(epochs)
        return (low - 0.5, high + 0.5) if low == high else (low, high)

    @cached_property
    def y(self) -> tuple[float, float]:
        """Numbers at the lower and the upper end of the frame."""
        values = [value for _, value in self._drawn]
        low, high = min(values), max(values)
        margin = (high - low) / 20 or abs(high) / 20 or 1.0
        return low - margin if low < 0 or low > margin else 0.0, high + margin

    def at(self, epoch: float, value: float) -> tuple[str, str]:
        """Where a point lies."""
        (x_0, x_1), (y_0, y_1) = self.x, self.y
        return (
            f"{LEFT + (RIGHT - LEFT) * (epoch - x_0) / (x_1 - x_0):.1f}",
            f"{BOTTOM - (BOTTOM - TOP) * (value - y_0) / (y_1 - y_0):.1f}",
        )

    @cached_property
    def x_ticks(self) -> list[tuple[str, str]]:
        """Places and texts."""
        whole = [tick for tick in _ticks(*self.x, 5, integer=True) if tick == round(tick)]
        return [(self.at(tick, self.y[0])[0], text) for tick, text in zip(whole, _texts(whole), strict=True)]

    @cached_property
    def y_ticks(self) -> list[tuple[str, str]]:
        """Places and texts."""
        ticks = _ticks(*self.y, 4)
        return [(self.at(self.x[0], tick)[1], text) for tick, text in zip(ticks, _texts(ticks), strict=True)]

    @cached_property
    def lines(self) -> list[Line]:
        """Of the runs that have the column."""
        return [self._line(run, _thinned(points)) for run, points in enumerate(self.points) if points]

    def _line(self, run: int, points: Points) -> Line:
        path, marks, before = [], [], None
        numbers = [None, *(value for _, value in points), None]
        for place, (epoch, value) in enumerate(points, 1):
            if value is not None:
                x, y = self.at(epoch, value)
                path.append(f"{'M' if before is None else 'L'}{x} {y}")
                alone = numbers[place - 1] is None and numbers[place + 1] is None
                if alone or len(points) <= MARKED:
                    marks.append((x, y, f"{self.names[run]}, epoch {epoch}: {self.text(value)}"))
            before = value
        return Line(run, "".join(path), marks)

    def text(self, value: float | None) -> str:
        """A number with its unit."""
        return "no number" if value is None else f"{short(value)} {self.unit}".strip()

    @cached_property
    def described(self) -> str:
        """The plot in words."""
        told = []
        for name, points in zip(self.names, self.points, strict=True):
            values = [value for _, value in points if value is not None]
            if values:
                told.append(
                    f"{name}: from {self.text(values[0])} to {self.text(values[-1])}, between "
                    f"{self.text(min(values))} and {self.text(max(values))}"
                )
        return f"{self.label} over the epochs. {'; '.join(told)}."

    @cached_property
    def data(self) -> str:
        """What the page's script needs, as JSON: scales, and points of each run with numbers as text."""
        lines = [
            [[epoch, value, self.text(value)] for epoch, value in _thinned(points) if value is not None]
            for points in self.points
        ]
        return json.dumps({"x": self.x, "y": self.y, "lines": lines}, separators=(",", ":"))


def plots(runs: Sequence[Run]) -> list[Plot]:
    """A plot for each column of numbers of any run, those of a group together; some have nothing to show."""
    columns = dict.fromkeys(name for run in runs for row in run.rows for name in row if name not in NOT_DRAWN)
    found = []
    for column in columns:
        points = [run.values(column) for run in runs]
        if any(value is not None for values in points for _, value in values):
            group, label, unit, factor = _described(column)
            scaled = tuple(
                [(epoch, None if value is None else value * factor) for epoch, value in values] for values in points
            )
            found.append(Plot(column, group, label, unit, tuple(run.name for run in runs), scaled))
    return sorted(found, key=lambda plot: (GROUPS.index(plot.group), _rank(plot.column)))


def short(value: float) -> str:
    """A number in four digits."""
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, _, power = f"{value:.3e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.{max(0, 3 - _power(value))}f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"


def _power(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def _described(column: str) -> tuple[str, str, str, float]:
    for pattern, group, label, unit, factor in LABELS:
        if found := re.fullmatch(pattern, column):
            return group, " ".join(found.expand(label).replace("_", " ").split()), unit, factor
    return "Other", one_line(column)[:60].replace("_", " "), "", 1


def _rank(column: str) -> tuple[int, str]:
    return next((place for place, known in enumerate(LABELS) if re.fullmatch(known[0], column)), len(LABELS)), column


def _ticks(low: float, high: float, count: int, integer: bool = False) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=integer).tick_values(low, high)
    return [float(tick) for tick in found if low <= tick <= high]


def _texts(ticks: Sequence[float]) -> list[str]:
    """With as many decimals as tell them apart."""
    largest = max(map(abs, ticks), default=0)
    exact = (places for places in range(8) if all(abs(round(tick, places) - tick) <= 1e-6 * largest for tick in ticks))
    places = next(exact, None)
    if places is None or not 1e-3 <= largest < 1e6:
        return [short(tick) for tick in ticks]
    return [f"{tick:.{places}f}" for tick in ticks]


def _thinned(points: Points) -> Points:
    """At most about :data:`MOST_POINTS`, with the extremes of each stretch that is drawn together."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept: Points = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        numbers = [(value, epoch) for epoch, value in stretch if value is not None]
        if not numbers:
            kept.append(stretch[0])
            continue
        ends = {stretch[0][0], stretch[-1][0]} & {points[0][0], points[-1][0]}
        chosen = {min(numbers)[1], max(numbers)[1], *ends}
        kept += [point for point in stretch if point[0] in chosen]
    return kept

"""What a run folder tells, whatever state it is in: what is missing or damaged becomes a notice."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from convnextv2.data.names import shown
from convnextv2.messages import one_line
from convnextv2.segmentation.training import SegmentOptions
from convnextv2.training.environment import NAME, read_sessions
from convnextv2.training.finetuning import FinetuneOptions
from convnextv2.training.pretraining import PretrainOptions
from convnextv2.training.recipe import recipe_text
from convnextv2.training.recipe_files import read_recipe
from convnextv2.training.saved_state import read_rows

T = TypeVar("T")
RECIPE, ROWS, CLASSES = "config.yaml", "metrics.jsonl", "class_indices.json"
MARKS = (RECIPE, ROWS, "checkpoints")
"""What makes a folder that of a run: any of them."""
TIES = {"val_top1": ("val_loss", -1), "val_miou": ("val_accuracy", 1)}
"""Columns of evaluations, and by what runs rank equal ones: the higher, or the lower."""
LARGEST = 1e30
"""Of a number that is drawn."""
MOST_BYTES = {RECIPE: 2**20, CLASSES: 2**24, ROWS: 2**28}
"""Of files that are read; those of runs are smaller by far."""
PRETRAINING, FINETUNING, PROBE, OTHER = "pre-training", "fine-tuning", "linear probe", "training"
SEGMENTATION = "segmentation"


@dataclass
class Run:
    """A run as its folder tells it.

    Args:
        path: of the folder.
        name: short, unlike that of the other runs of a report.
        kind: of training, in words.
        recipe: options and values; empty where they cannot be read.
        usual: the defaults of those options.
        rows: of the metrics, in the order of their epochs, each once.
        sessions: see :mod:`convnextv2.training.environment`.
        classes: their names.
        notices: what is missing, damaged or unusual; a line each.
    """

    path: Path
    name: str
    kind: str = OTHER
    recipe: dict[str, Any] = field(default_factory=dict)
    usual: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    notices: list[str] = field(default_factory=list)

    def values(self, column: str) -> list[tuple[int, float | None]]:
        """Epochs that have a column, and its number or None where it has none that could be drawn."""
        return [(row["epoch"], number(row[column])) for row in self.rows if is_numeric(row.get(column, ""))]

    def last(self, column: str) -> float | None:
        """The last number of a column."""
        return next((value for _, value in reversed(self.values(column)) if value is not None), None)

    @property
    def epochs(self) -> int:
        """The last epoch that is recorded."""
        return int(self.rows[-1]["epoch"]) if self.rows else 0

    @property
    def planned(self) -> int | None:
        """Epochs that the recipe asks for."""
        asked = self.recipe.get("epochs")
        return asked if isinstance(asked, int) and not isinstance(asked, bool) and asked > 0 else None

    @property
    def again(self) -> str:
        """A command that would do the same anew."""
        names = {PRETRAINING: "pretrain", FINETUNING: "finetune", PROBE: "finetune", SEGMENTATION: "segment train"}
        name = names.get(self.kind)
        if name is None or not self.recipe:
            return ""
        return f"fcmae {name} --config {shlex.quote(shown(str(self.path / RECIPE)))} --output runs/again"


def is_numeric(value: Any) -> bool:
    """Whether a value of a row belongs into a column of numbers: a number, or the null that stands for a lost one."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def number(value: float | None) -> float | None:
    """A number that can be drawn, or None."""
    return float(value) if value is not None and abs(value) <= LARGEST else None


def is_run(path: Path) -> bool:
    """Whether a folder holds anything of a run."""
    return any((path / name).exists() for name in MARKS)


def short_names(paths: Sequence[Path]) -> list[str]:
    """For each folder as many of the last parts of its path as tell it from the others, at least one."""
    parts = [path.resolve().parts for path in paths]
    names = []
    for own in parts:
        count = 1
        while count < len(own) and sum(other[-count:] == own[-count:] for other in parts) > 1:
            count += 1
        names.append(one_line(shown("/".join(own[-count:]))))
    return names


def read_run(path: Path, name: str) -> Run:
    """A run from its folder, which is left as it is. Nothing that lies in it is an error."""
    run = Run(path, name)
    run.recipe = _read(run, RECIPE, read_recipe) or {}
    run.rows = _rows(run)
    run.kind = _kind(run)
    kinds: dict[str, Any] = {PRETRAINING: PretrainOptions, FINETUNING: FinetuneOptions, PROBE: FinetuneOptions}
    defaults = (kinds | {SEGMENTATION: SegmentOptions}).get(run.kind)
    run.usual = yaml.safe_load(recipe_text(defaults())) if defaults else {}
    run.classes = _read(run, CLASSES, _classes, required=run.kind in (FINETUNING, PROBE, SEGMENTATION)) or ()
    run.sessions = _read(run, NAME, lambda file: read_sessions(file.parent), required=False) or []
    _tell_state(run)
    return run


def _read(run: Run, name: str, reader: Callable[[Path], T], required: bool = True) -> T | None:
    """What a reader makes of a file of the run; None, and a notice, where it cannot be read."""
    path = run.path / name
    try:
        if not path.is_file():
            if required or path.exists():
                run.notices.append(f"{name}: is {'no file' if path.exists() else 'missing'}")
            return None
        if path.stat().st_size > MOST_BYTES.get(name, 2**28):
            run.notices.append(f"{name}: left out, larger than what runs write")
            return None
        return reader(path)
    except OSError as error:
        run.notices.append(f"{name}: cannot be read: {error.strerror or error}")
    except ValueError as error:
        reason = one_line(error).removeprefix(one_line(path)).strip(" :")
        run.notices.append(f"{name}: left out, as it {reason}" if name == NAME else f"{name}: left out: {reason}")
    return None


def _rows(run: Run) -> list[dict[str, Any]]:
    damaged: list[str] = []
    found = _read(run, ROWS, lambda path: read_rows(path, damaged.append), required=False) or []
    if damaged:
        more = f", and {len(damaged) - 1} more like it" if len(damaged) > 1 else ""
        run.notices.append(damaged[0] + more)
    rows = {row["epoch"]: row for row in found}
    if len(rows) < len(found):
        run.notices.append(f"{ROWS}: some epochs are there more than once; their last row is shown")
    ordered = [rows[epoch] for epoch in sorted(rows)]
    for column in dict.fromkeys(name for row in ordered for name in row):
        values = [row[column] for row in ordered if is_numeric(row.get(column, ""))]
        lost = sum(number(value) is None for value in values)
        if lost:
            run.notices.append(
                f"{ROWS}: {one_line(column)[:60]} is no finite number, or too large to draw, in {lost} of "
                f"{len(values)} epochs"
            )
    return ordered


def _kind(run: Run) -> str:
    if "mask_ratio" in run.recipe or (not run.recipe and any("loss" in row for row in run.rows)):
        return PRETRAINING
    if "linear_probe" in run.recipe:
        return PROBE if run.recipe["linear_probe"] is True else FINETUNING
    if "decoder_width" in run.recipe:
        return SEGMENTATION
    return FINETUNING if any("train_loss" in row for row in run.rows) else OTHER


def _classes(path: Path) -> tuple[str, ...]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError("is no mapping from numbers to names of classes")
    return tuple(found.values())


def best_epoch(run: Run, column: str) -> int | None:
    """The epoch that a run keeps as its best by a column of :data:`TIES`; None where it has no number."""
    name, sign = TIES[column]
    ties = {epoch: sign * value for epoch, value in run.values(name) if value is not None}
    found = [(value, ties.get(epoch, 0.0), -epoch) for epoch, value in run.values(column) if value is not None]
    return -max(found)[2] if found else None


def _out_of_patience(run: Run) -> bool:
    best = [epoch for column in TIES if (epoch := best_epoch(run, column)) is not None]
    patience = run.recipe.get("patience")
    return isinstance(patience, int) and bool(best) and run.epochs - best[0] >= patience


def _tell_state(run: Run) -> None:
    if not run.rows:
        run.notices.insert(0, "no epoch is recorded yet: there are no curves")
    elif run.planned is not None and run.epochs < run.planned and not _out_of_patience(run):
        written = time.strftime("%Y-%m-%d at %H:%M", time.gmtime((run.path / ROWS).stat().st_mtime))
        told = (
            f"{run.epochs} of {run.planned} epochs: still running, or stopped; the last was recorded on {written} UTC"
        )
        run.notices.insert(0, told)

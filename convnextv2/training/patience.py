"""Early stopping: a run ends when its evaluations have not become better for some epochs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def check_patience(options: Any, parts: Sequence[Any]) -> None:
    """Raise ValueError where a run of these options has no part of its data to evaluate on, and is to wait for that."""
    if options.patience is not None and len(parts) < 2:
        raise ValueError("`patience` counts evaluations, and this run has no images to evaluate on; leave it out")


def out_of_patience(run: Any, done: int) -> bool:
    """Whether a run has done ``patience`` epochs since its best evaluation, which it keeps with its ``epoch``."""
    patience: int | None = run.options.patience
    return patience is not None and run.best is not None and done - run.best["epoch"] >= patience


def epochs_of(run: Any) -> Iterator[int]:
    """Epochs that are left of a :class:`~convnextv2.training.run.Run`, from 0: all, or until it is out of patience."""
    for epoch in range(run.start, run.options.epochs):
        if out_of_patience(run, epoch):
            run.say(f"stopped early, after epoch {epoch}: none was better than epoch {int(run.best['epoch'])}")
            return
        yield epoch

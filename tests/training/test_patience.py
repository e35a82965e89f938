"""Runs that end early, where evaluations no longer become better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from train_helpers import finetune_options, make_images, pretrain_options

from convnextv2.training import finetune, pretrain

STILL: dict[str, Any] = {"lr": 1e-30, "weight_decay": 0.0, "warmup_epochs": 0, "schedule": "constant"}
"""Nothing is learned, so no epoch is better than the first one."""


def test_a_run_ends_when_nothing_becomes_better_and_goes_on_when_told(tmp_path: Path) -> None:
    data, output = make_images(tmp_path / "set"), tmp_path / "run"
    lines: list[str] = []
    result = finetune(finetune_options(data, output, epochs=9, patience=2, **STILL), log=lines.append)
    assert [row["epoch"] for row in result.metrics] == [1, 2, 3]
    assert (result.epochs, result.best_epoch) == (3, 1)
    assert lines[-1] == "stopped early, after epoch 3: none was better than epoch 1"
    drawn = (output / "loss.png").stat().st_mtime_ns
    assert drawn > (output / "metrics.jsonl").stat().st_mtime_ns  # with the last row

    again = finetune(finetune_options(data, output, epochs=9, patience=2, resume=True, **STILL), log=lines.append)
    assert again.epochs == 3
    assert lines[-1].startswith("stopped early, after epoch 3")
    longer = finetune(finetune_options(data, output, epochs=5, patience=9, resume=True, **STILL), log=lines.append)
    assert longer.epochs == len(longer.metrics) == 5


def test_a_run_that_becomes_better_goes_on(tmp_path: Path) -> None:
    data = make_images(tmp_path / "set")
    result = finetune(finetune_options(data, tmp_path / "run", epochs=4, patience=1, lr=1e-4, warmup_epochs=0))
    assert result.epochs == len(result.metrics) == 4


def test_patience_needs_evaluations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`patience` counts evaluations"):
        pretrain(pretrain_options(make_images(tmp_path / "set"), tmp_path / "run", patience=3))
    with pytest.raises(ValueError, match="`patience` must be at least 1"):
        finetune(finetune_options("digits", tmp_path / "run", patience=0))
    assert not (tmp_path / "run").exists()

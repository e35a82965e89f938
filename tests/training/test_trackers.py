"""Which tracker a run logs to."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from train_helpers import make_images, pretrain_options

from convnextv2.training import pretrain
from convnextv2.training.processes import tracker_of


@pytest.mark.parametrize(
    ("asked", "there", "found"),
    [
        *((("auto"), there, "tensorboard" if there else None) for there in (True, False)),
        *((none, True, None) for none in ("none", None)),
        ("wandb", False, "wandb"),
    ],
)
def test_tensorboard_is_taken_where_it_is_installed(
    asked: str | None, there: bool, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    assert tracker_of(asked) == found


def test_a_tracker_gets_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda self, row, step: logged.append((step, row)))
    images = make_images(tmp_path / "images", classes=("red", "green"), count=3)
    result = pretrain(pretrain_options(images, tmp_path / "run"))
    assert [step for step, _ in logged] == [1, 2]
    assert [row for _, row in logged] == result.metrics

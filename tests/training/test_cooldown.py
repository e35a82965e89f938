"""A constant learning rate, and the cooldown that ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import make_images, pretrain_options, weights

from convnextv2.training import PretrainOptions, pretrain
from convnextv2.training.cooldown import schedule_of
from convnextv2.training.optim import create_optimizer


def rates(steps: range | list[int], **given: Any) -> list[float]:
    options = PretrainOptions(**{"schedule": "constant", "epochs": 10, "warmup_epochs": 2, "min_lr": 0.5, **given})
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": 0.5}]
    optimizer = create_optimizer(groups, 2.0, (0.9, 0.95))
    schedule = schedule_of(options, optimizer, 10)
    found = []
    for step in steps:
        schedule.step_update(step)
        found.append(2 * optimizer.param_groups[0]["lr"])
    return found


def test_a_rate_rises_stays_and_falls() -> None:
    steps = [0, 10, 20, 59, 60, 70, 80, 100]
    assert rates(steps) == pytest.approx([0, 1, 2, 2, 2, 2, 2, 2])
    assert rates(steps, cooldown_epochs=4) == pytest.approx([0, 1, 2, 2, 2, 1.625, 1.25, 0.5])
    assert rates([0, 50, 99], cooldown_epochs=10) == pytest.approx([2, 1.25, 0.515])
    assert rates([0, 45, 90, 91], epochs=10, warmup_epochs=40, cooldown_epochs=1) == pytest.approx([0, 2, 2, 1.85])
    assert rates([0, 10, 20, 60, 100], schedule="cosine") == pytest.approx([0, 1, 2, 1.25, 0.5])


def test_a_longer_run_begins_as_the_shorter_one() -> None:
    """So that what is resumed with more epochs and a cooldown is one run."""
    assert rates(range(100), warmup_epochs=5) == rates(range(100), warmup_epochs=5, epochs=13, cooldown_epochs=3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"cooldown_epochs": 1.0}, "`cooldown_epochs` is for `schedule` constant"),
        ({"cooldown_epochs": 3.0, "schedule": "constant"}, "`cooldown_epochs` 3 is more than `epochs` 2"),
        ({"cooldown_epochs": -1.0, "schedule": "constant"}, "`cooldown_epochs` must be a finite number, not negative"),
        ({"schedule": "linear"}, "`schedule` must be one of cosine, constant, got 'linear'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        pretrain(pretrain_options("digits", tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()


def test_a_constant_run_is_ended_by_a_cooldown(tmp_path: Path) -> None:
    data = make_images(tmp_path / "set")
    given: dict[str, Any] = {"schedule": "constant", "warmup_epochs": 0, "lr": 1e-3, "batch_size": 15}
    pretrain(pretrain_options(data, tmp_path / "run", epochs=2, **given))
    ended = pretrain(pretrain_options(data, tmp_path / "run", epochs=4, cooldown_epochs=2, resume=True, **given))
    assert [row["lr"] for row in ended.metrics] == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])
    whole = pretrain(pretrain_options(data, tmp_path / "whole", epochs=4, cooldown_epochs=2, **given))
    for name, value in weights(whole.folder).items():
        assert torch.equal(value, weights(ended.folder)[name]), name

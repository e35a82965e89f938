"""A run that is resumed with other options trains by them, or refuses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from train_helpers import finetune_options, make_images

from convnextv2.training import RunStoppedError, finetune
from convnextv2.training import run as runs
from convnextv2.training.finetuning import save_confusion_matrix
from convnextv2.weights.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set")


@pytest.mark.parametrize(("before", "after"), [(2, 6), (6, 2)])
def test_the_rate_goes_on_where_it_was_with_another_batch(
    images: Path, tmp_path: Path, before: int, after: int
) -> None:
    how: dict[str, Any] = {"warmup_epochs": 0, "lr": 1e-4}
    finetune(finetune_options(images, tmp_path / "run", epochs=2, batch_size=before, **how))
    said = list[str]()
    again = finetune_options(images, tmp_path / "run", epochs=4, batch_size=after, resume=True, **how)
    rows = finetune(again, log=said.append).metrics
    whole = finetune(finetune_options(images, tmp_path / "whole", epochs=4, batch_size=after, **how)).metrics
    assert rows[-1]["step"] == 2 * 12 // before + 2 * 12 // after
    assert [row["lr"] for row in rows[2:]] == pytest.approx([row["lr"] for row in whole[2:]], rel=1e-6)
    assert any("epochs had another number of steps before" in line for line in said)


def test_what_is_asked_of_the_optimizer_holds(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: dict[str, Any] = {"layer_decay": 0.9, "data": images, "output": tmp_path / "run"}
    finetune(finetune_options(epochs=1, **run))
    groups, begin = list[dict[str, Any]](), runs.Run.begin

    def watched(self: Any) -> None:
        groups.extend(dict(group) for group in self.loop.optimizer.param_groups)
        begin(self)

    monkeypatch.setattr(runs.Run, "begin", watched)
    changed = {"weight_decay": 0.5, "betas": (0.5, 0.6), "layer_decay": 0.5}
    finetune(finetune_options(epochs=2, resume=True, **run | changed))
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert {group["betas"] for group in groups} == {(0.5, 0.6)}
    assert {group["lr_scale"] for group in groups} == {0.5**above for above in range(5)}


@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"layer_decay": 0.9}, CheckpointError, "keep `official_weight_decay`, `layer_decay_type`"),
        ({"ema_decay": 0.9}, CheckpointError, "without averaged weights, keep `ema_decay`"),
        ({"seed": 5}, ValueError, "`seed` 5 would split and order the images anew: keep 0"),
    ],
    ids=["groups", "average", "seed"],
)
def test_what_a_state_does_not_fit_is_refused_by_name(
    images: Path, tmp_path: Path, changed: dict[str, Any], error: type[Exception], told: str
) -> None:
    finetune(finetune_options(images, tmp_path / "run", epochs=1))
    with pytest.raises(error, match=told):
        finetune(finetune_options(images, tmp_path / "run", epochs=2, resume=True, **changed))


def test_the_matrix_of_the_best_epoch_is_drawn_before_a_run_is_stopped(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = list[Any]()

    def drawing(path: Path, matrix: Any, classes: Any) -> None:
        drawn.append(matrix.clone())
        save_confusion_matrix(path, matrix, classes)

    monkeypatch.setattr("convnextv2.training.finetuning.save_confusion_matrix", drawing)
    outcomes, measure = list[Any](), runs.Run.measure

    def measured(self: Any, epoch: int, pace: dict[str, float]) -> Any:
        found = measure(self, epoch, pace)
        self.stop.asked = 15 if epoch == 2 else self.stop.asked
        outcomes.append(self._best_outcome.details)
        return found

    monkeypatch.setattr(runs.Run, "measure", measured)
    with pytest.raises(RunStoppedError, match="3 epochs are saved"):
        finetune(finetune_options(images, tmp_path / "run", epochs=6, lr=1e-2, batch_size=2))
    assert len(drawn) == 2
    assert drawn[-1].equal(outcomes[-1])


def test_optimizers_that_do_not_fit_are_refused(images: Path, tmp_path: Path) -> None:
    for name in ("adan", "adahessian"):
        with pytest.raises(ValueError, match=f"`optimizer` {name} needs second derivatives or another number"):
            finetune(finetune_options(images, tmp_path / name, optimizer=name))
    with pytest.raises(ValueError, match="timm knows no policy 'banana'"):
        finetune(finetune_options(images, tmp_path / "policy", auto_augment="banana"))
    with pytest.raises(ValueError, match=r"`min_lr` 0\.1 is above the peak learning rate"):
        finetune(finetune_options(images, tmp_path / "rate", lr=1e-3, min_lr=0.1))

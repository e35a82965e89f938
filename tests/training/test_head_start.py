"""Heads fitted before the first epoch, and runs with at least so many updates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from train_helpers import finetune_options, make_images, pretrain_options, weights

from convnextv2.training import RunStoppedError, finetune, head_start, pretrain
from convnextv2.training.feeding import passes_for
from convnextv2.training.head_start import USUAL_STRENGTH, fit_head

HERE = Path(__file__).parent
STILL: dict[str, Any] = {"lr": 1e-30, "epochs": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set", count=6)


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def blobs(classes: int, count: int, noise: float, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features ``[N, 6]`` around a centre a class, far from zero and of very different scales, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), count)
    centres = np.eye(6)[:classes]
    features = centres[labels] + noise * rng.standard_normal((len(labels), 6))
    return (features * 10.0 ** np.arange(-3, 3) + 7).astype(np.float32), labels


def logits(head: head_start.FittedHead, features: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(features @ head.weight.T + head.bias)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_head_takes_features_as_they_are(classes: int) -> None:
    head = fit_head(*blobs(classes, 20, 0.1), classes)
    features, labels = blobs(classes, 50, 0.1, seed=1)
    found = logits(head, features)
    assert found.shape == (50 * classes, classes)
    assert (found.argmax(1).numpy() == labels).all()
    assert head.top1 == 100.0
    assert head.loss is not None and head.loss < 0.1


def test_the_probabilities_of_a_head_are_right_where_there_is_nothing_to_learn() -> None:
    features, labels = blobs(3, 30, 1.0)
    shuffled = np.random.default_rng(2).permutation(labels)
    head = fit_head(features, shuffled, 3)
    assert head.strength == min(head_start.STRENGTHS)
    probabilities = logits(head, blobs(3, 30, 1.0, seed=3)[0]).softmax(1)
    assert probabilities.max() < 0.5


def test_classes_of_few_images_are_fitted_too() -> None:
    features, labels = blobs(4, 10, 0.1)
    kept = np.r_[0:10, 10:20, 20:21]  # ten, ten and one; none of the last class
    head = fit_head(features[kept], labels[kept], 5)
    found = logits(head, features[kept])
    assert (found.argmax(1).numpy() == labels[kept]).all()
    assert not head.weight[3:].any()
    assert head.bias[3] == head.bias[4]
    alone = fit_head(features[[0, 10, 20]], labels[[0, 10, 20]], 4)
    assert (alone.strength, alone.top1) == (USUAL_STRENGTH, None)
    with pytest.raises(ValueError, match="`head_start` needs images of two classes, found 1"):
        fit_head(features[:10], labels[:10], 4)


def test_rare_classes_among_many_images_do_not_choose_the_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that is held out need not have any of their images."""
    monkeypatch.setattr(head_start, "MANY", 200)
    features, labels = blobs(3, 100, 0.5)
    for rare in range(3, 9):
        features = np.concatenate([features, features[:2] + rare])
        labels = np.concatenate([labels, np.full(2, rare)])
    head = fit_head(features, labels, 9)
    assert head.loss is not None
    assert np.isfinite(head.loss)
    assert head.strength == fit_head(*blobs(3, 100, 0.5), 3).strength
    assert np.abs(head.weight).sum(1).min() > 0, "all are fitted"


def test_many_images_are_thinned_out_evenly(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(head_start, "MOST_IMAGES", 9)
    monkeypatch.setattr(head_start, "MANY", 5)
    finetune(finetune_options(images, tmp_path / "run", head_start=True, **STILL), log=lines.append)
    (line,) = [line for line in lines if line.startswith("head start:")]
    assert "on 9 images" in line and "held out: top-1" in line


@pytest.mark.parametrize("pooling", ["mean", "stages"])
@pytest.mark.parametrize("linear_probe", [False, True])
def test_a_run_begins_with_what_the_encoder_knows(
    images: Path, tmp_path: Path, linear_probe: bool, pooling: str
) -> None:
    pretrained = tmp_path / "pretrained"
    pretrain(pretrain_options(images, pretrained, epochs=1))
    given = {"init": pretrained, "linear_probe": linear_probe, "pooling": pooling, **STILL}
    plain = finetune(finetune_options(images, tmp_path / "plain", **given))
    found = finetune(finetune_options(images, tmp_path / "found", **given, head_start=True, ema_decay=0.9))
    assert plain.best_top1 < 70
    assert found.best_top1 == 100
    assert found.metrics[0]["val_loss"] < 0.7 * plain.metrics[0]["val_loss"]
    assert found.metrics[0]["train_loss"] < plain.metrics[0]["train_loss"]
    again = finetune(finetune_options(images, tmp_path / "again", **given, head_start=True, ema_decay=0.9))
    assert torch.equal(found.model.head.weight, again.model.head.weight)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_images_of_other_channels(tmp_path: Path, in_chans: int) -> None:
    rng = np.random.default_rng(0)
    for name, level in (("dark", 0.2), ("bright", 0.6)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.uniform(level, level + 0.2, (40, 48, in_chans)).astype(np.float32)
            np.save(tmp_path / "set" / name / f"{number}.npy", pixels)
    options = finetune_options(tmp_path / "set", tmp_path / "run", in_chans=in_chans, head_start=True, **STILL)
    assert finetune(options).best_top1 == 100


def stop(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
    for index, item in enumerate(items):
        if index == 1 and description.startswith("epoch 3/"):
            signal.raise_signal(signal.SIGINT)
        yield item


def test_a_stopped_and_resumed_run_is_bit_identical(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra: dict[str, Any] = {"epochs": 4, "lr": 1e-3, "ema_decay": 0.9, "mixup": 0.8, "head_start": True}
    extra |= {"min_steps": 30, "min_lr": 1e-5, "pooling": "stages"}
    finetune(finetune_options(images, tmp_path / "whole", **extra))
    with pytest.raises(RunStoppedError):
        finetune(finetune_options(images, tmp_path / "parts", **extra), progress=stop)
    monkeypatch.setattr("convnextv2.training.finetuning.start_head", None)  # not to be called again
    finetune(finetune_options(images, tmp_path / "parts", **extra, resume=True))
    for name in ("best", "last"):
        expected, got = weights(tmp_path / "whole", name), weights(tmp_path / "parts", name)
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert [row["val_loss"] for row in rows(tmp_path / "whole")] == [
        row["val_loss"] for row in rows(tmp_path / "parts")
    ]
    assert [row["step"] for row in rows(tmp_path / "whole")] == [11, 22, 33, 44]  # 15 images, 3 passes, batches of 4
    assert rows(tmp_path / "whole")[-1]["lr"] < 2e-5  # the cosine ends with the last pass


@pytest.mark.slow
def test_all_processes_have_the_head_of_the_first(images: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*launcher, HERE / "head_start_run.py", tmp_path, images]
    subprocess.run(list(map(str, command)), check=True, env=environment, capture_output=True, timeout=300)
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2))
    assert first["weight"].any()
    assert torch.equal(first["weight"], second["weight"])
    assert torch.equal(first["bias"], second["bias"])


@pytest.mark.parametrize(
    ("changes", "processes", "expected"),
    [
        ({}, 1, 8),  # 24 steps of 4 in 4 epochs: 24 images an epoch, of 3
        ({"epochs": 50}, 1, 2),
        ({"accum": 3}, 2, 48),
        ({"views": 2}, 1, 4),
        ({"epochs": 10_000, "batch_size": 2}, 1, 1),
    ],
)
def test_passes(images: Path, tmp_path: Path, changes: dict[str, Any], processes: int, expected: int) -> None:
    options = finetune_options(images, tmp_path, **{"epochs": 4, **changes})
    assert passes_for(None, 24, 3, options, processes) == expected
    assert passes_for(None, 0, 3, options, processes) == 1
    assert passes_for({"passes": 5}, 24, 3, options, processes) == 5
    assert passes_for({}, 24, 3, options, processes) == 1


def test_a_longer_run_keeps_its_passes(images: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options: dict[str, Any] = {"min_steps": 12, "lr": 1e-3}
    finetune(finetune_options(images, tmp_path / "run", **options), log=lines.append)
    assert "an epoch goes through the 15 images 2 times, for `min_steps`" in lines
    finetune(finetune_options(images, tmp_path / "run", **options, resume=True), log=lines.append)
    finetune(finetune_options(images, tmp_path / "run", **{**options, "epochs": 4}, resume=True), log=lines.append)
    assert [row["step"] for row in rows(tmp_path / "run")] == [7, 14, 21, 28]


def test_steps_are_counted(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`min_steps` must be at least 0 and below inf, got -1"):
        finetune(finetune_options(images, tmp_path / "run", min_steps=-1))
    finetune(finetune_options(images, tmp_path / "run", min_steps=20, accum=2, lr=1e-3))
    assert rows(tmp_path / "run")[-1]["step"] >= 20

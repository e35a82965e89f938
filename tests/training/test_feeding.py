"""Options of loading: what they refuse, what they leave as it was, recipes; the share of an epoch that waits."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from train_helpers import finetune_options, make_images, pretrain_options, weights

from convnextv2.data import batches
from convnextv2.data.build import build_pretrain_dataset
from convnextv2.data.datasets import ImageDataset
from convnextv2.data.decoding import Wanted
from convnextv2.data.images import load_image
from convnextv2.training import PretrainOptions, finetune, pretrain, run
from convnextv2.training.feeding import Feed, fitting_batch, needed_side
from convnextv2.training.recipe import parse_options
from convnextv2.training.signals import RunStoppedError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set")


def losses(run_it: Callable[..., Any], options: Any) -> tuple[list[float], list[str]]:
    found, lines = list[float](), list[str]()
    run_it(options, on_loss=lambda step, loss: found.append(loss), log=lines.append)
    return found, lines


def test_a_run_leaves_no_worker_behind(images: Path, tmp_path: Path) -> None:
    """Whether it ends or is stopped, whose error holds on to all that was going on; workers give way to the
    training."""

    def log(line: str) -> None:
        if line.startswith("epoch 1/2"):
            workers = [child.pid for child in active_children() if child.pid not in before]
            own = os.getpriority(os.PRIO_PROCESS, 0)
            assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in workers} == {min(own + 10, 19)}
            signal.raise_signal(signal.SIGTERM)

    before = {child.pid for child in active_children()}
    options = finetune_options(images, tmp_path / "run", epochs=2, workers=2)
    with pytest.raises(RunStoppedError) as stopped:
        finetune(options, log=log)
    assert {child.pid for child in active_children()} == before
    finetune(replace(options, resume=True), log=lambda line: None)
    assert {child.pid for child in active_children()} == before
    assert stopped.value.status == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"views": 0}, "`views` must be at least 1"),
        ({"views": 3}, "`batch_size` 4 counts crops, so `views` 3 must divide it"),
        ({"cache_side": 0, "cache": "somewhere"}, "`cache_side` must be at least 1"),
        ({"cache_side": 64}, "name its folder too"),
        ({"resize": "lanczos"}, "`resize` must be one of pillow, torchvision"),
        ({"augment_on": "gpu"}, "`augment_on` must be one of loader, device"),
        ({"augment_on": "device", "resize": "torchvision"}, "`resize` is of the loader"),
        ({"augment_on": "device", "auto_augment": "rand-m9"}, "`augment_on` device knows crops and flips"),
        ({"augment_on": "device", "random_erasing": 0.25}, "`augment_on` device knows crops and flips"),
        ({"resize": "torchvision", "color_jitter": 0.4}, "`resize` torchvision knows crops and flips"),
        ({"cache": "INSIDE"}, "lies in `data`"),
    ],
    ids=str,
)
def test_nonsense_is_refused_in_a_line(images: Path, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    values = {**changes, "cache": images / "cache"} if changes.get("cache") == "INSIDE" else changes
    with pytest.raises(ValueError) as error:
        finetune(finetune_options(images, tmp_path / "run", **values))
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    assert not (images / "cache").exists()


def test_digits_cannot_be_cached(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^`cache` is for images in files"):
        pretrain(pretrain_options("digits", tmp_path / "run", cache=tmp_path / "cache", in_chans=1))


def test_a_cached_run_has_the_bits_of_one_that_is_not(images: Path, tmp_path: Path) -> None:
    plain, _ = losses(finetune, finetune_options(images, tmp_path / "plain"))
    cache = {"cache": tmp_path / "cache"}
    kept, first = losses(finetune, finetune_options(images, tmp_path / "kept", **cache))
    again, second = losses(finetune, finetune_options(images, tmp_path / "again", **cache, workers=2))
    assert plain == kept == again
    assert all(
        torch.equal(value, weights(tmp_path / "kept")[name]) for name, value in weights(tmp_path / "plain").items()
    )
    assert [any(line.startswith("caching 15 images") for line in lines) for lines in (first, second)] == [True, False]


@pytest.mark.parametrize(
    "changes",
    [
        {"resize": "torchvision"},
        {"augment_on": "device"},
        {"augment_on": "device", "cache": True, "views": 2, "workers": 1},
        {"views": 4, "cache": True, "resize": "torchvision"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_every_way_trains(images: Path, tmp_path: Path, changes: dict[str, Any], kind: str) -> None:
    """In tests/data the samples are compared; here: a run's numbers, steps and images."""
    values = {**changes, **({"cache": str(tmp_path / "cache")} if "cache" in changes else {}), "epochs": 1}
    views, make = values.get("views", 1), pretrain_options if kind == "pretrain" else finetune_options
    result = (pretrain if kind == "pretrain" else finetune)(make(images, tmp_path / "run", **values))
    (row,) = result.metrics
    decoded = 15 if kind == "pretrain" else 12
    assert row["step"] == decoded // (4 // views)
    assert 0 <= row["data_wait"] <= 1
    recipe = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert all(recipe[name] == value for name, value in values.items())


def test_a_resumed_run_keeps_its_way_of_loading(images: Path, tmp_path: Path) -> None:
    options = {"views": 2, "resize": "torchvision", "cache": str(tmp_path / "cache"), "epochs": 2}
    pretrain(pretrain_options(images, tmp_path / "whole", **options))
    pretrain(pretrain_options(images, tmp_path / "parts", **{**options, "epochs": 1}, lr=1e-3))
    read = parse_options(PretrainOptions, ["--output", str(tmp_path / "parts"), "--resume", "--epochs", "2"])
    assert {name: getattr(read, name) for name in options} == options
    assert len(pretrain(read).metrics) == 2


@pytest.mark.parametrize(("size", "views", "expected"), [(64, 1, 64), (45, 3, 42), (7, 2, 6), (12, 4, 12)])
def test_a_batch_fits_views_and_task(size: int, views: int, expected: int) -> None:
    assert fitting_batch(size, views, lambda count: count - count % 2) == expected


def test_the_share_that_is_waited() -> None:
    class Slow:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            for number in range(3):
                time.sleep(0.05)
                yield number

        epoch = 7

    feed = Feed(Slow(), lambda batch: time.sleep(0.02) or batch + 1)
    start = time.perf_counter()
    assert list(feed) == [1, 2, 3]
    seconds = time.perf_counter() - start
    assert 0.15 <= feed.waited < seconds - 0.05  # what is done with a batch does not count
    assert feed.share(seconds) == pytest.approx(feed.waited / seconds, abs=1e-3)
    assert feed.share(0.0) == 1.0
    assert (len(feed), feed.epoch) == (3, 7)
    assert Feed([], lambda batch: batch).share(1.0) == 0.0


def test_the_share_is_in_the_line_and_in_the_metrics(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ImageDataset.load

    def slow(self: ImageDataset, *arguments: Any) -> Any:
        time.sleep(0.05)
        return load(self, *arguments)

    monkeypatch.setattr(ImageDataset, "load", slow)
    _, lines = losses(pretrain, pretrain_options(images, tmp_path / "run", epochs=1))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 0.5 <= row["data_wait"] * row["seconds"] <= row["seconds"]  # 12 images of 15: full batches
    assert lines[-1].endswith(f", {100 * row['data_wait']:.0f} % waiting for data")


def test_the_side_that_no_crop_is_enlarged_from() -> None:
    assert needed_side((224, 224), 0.2) == 501
    assert needed_side((192, 224), 0.25) == 448
    assert needed_side((224, 224), 1.0) == 256  # what validation resizes to


def test_large_jpegs_are_reduced_on_request_only(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.effect_noise((1000, 700), 60).convert("RGB").save(path)
    assert load_image(path, 3).size == (1000, 700)
    for least, size in ((351, (1000, 700)), (350, (500, 350)), (175, (250, 175)), (10, (125, 88)), (20, (125, 88))):
        assert load_image(path, 3, Wanted(least_side=least)).size == size
    Image.open(path).save(tmp_path / "large.png")
    assert load_image(tmp_path / "large.png", 3, Wanted(least_side=10)).size == (1000, 700)
    options = pretrain_options(tmp_path, tmp_path / "run", reduce_jpeg=True, img_size=(64, 64))
    assert options.wanted == Wanted(least_side=144)
    (tmp_path / "large.png").unlink()
    assert build_pretrain_dataset(tmp_path, (64, 64), wanted=options.wanted).source.load(0).size == (250, 175)
    assert finetune_options(tmp_path, tmp_path, reduce_jpeg=True, crop_scale=(0.25, 1)).wanted.least_side == 64
    assert pretrain_options(tmp_path, tmp_path).wanted == Wanted()


def test_batches_come_without_blocking_and_channels_last_on_a_gpu(
    images: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The layout of a GPU, tried on a processor: weights and batches, and checkpoints as ever."""
    assert batches.memory_format(torch.device("cuda"), True) == torch.channels_last
    assert batches.memory_format(torch.device("cuda"), False) == torch.contiguous_format
    assert batches.memory_format(torch.device("cpu"), True) == torch.contiguous_format
    plain, _ = losses(finetune, finetune_options(images, tmp_path / "plain", ema_decay=0.9))

    seen: list[bool] = []
    moved: list[bool] = []
    monkeypatch.setattr(run, "memory_format", lambda *_: torch.channels_last)
    train = run.Run.train

    def watched(self: run.Run, epoch: int) -> Any:
        moved.append(self._loader.loader._non_blocking)
        finish = self._loader.finish

        def look(batch: Any) -> Any:
            done = finish(batch)
            seen.append(done[0].is_contiguous(memory_format=torch.channels_last))
            return done

        self._loader.finish = look
        stem = next(weight for weight in self.model.parameters() if weight.dim() == 4)
        seen.append(stem.is_contiguous(memory_format=torch.channels_last))
        return train(self, epoch)

    monkeypatch.setattr(run.Run, "train", watched)
    found, _ = losses(finetune, finetune_options(images, tmp_path / "last", ema_decay=0.9))
    assert all(seen)
    assert len(seen) > 4
    assert moved == [True, True]
    assert found == pytest.approx(plain, rel=1e-5)
    for name in ("last", "best"):
        assert all(
            value.is_contiguous()
            for value in load_file(tmp_path / "last" / "checkpoints" / f"{name}.safetensors").values()
        )
    assert len(finetune(finetune_options(images, tmp_path / "last", ema_decay=0.9, epochs=3, resume=True)).metrics) == 3

"""Runs of segmentation on the common skeleton: they learn, resume, survive kills, and are the same in every way."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import launching
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shapes import SMALL, make_parts, segment_options

from convnextv2 import create_fcmae
from convnextv2.report.page import facts
from convnextv2.report.runs import read_run
from convnextv2.segmentation import SegmentOptions, load_segmenter, segment
from convnextv2.segmentation.predicting import Running, evaluate_pairs
from convnextv2.segmentation.training import SegmentTask, image_losses
from convnextv2.segmentation.windows import Windows
from convnextv2.training import RunStoppedError, finetune
from convnextv2.weights import CheckpointError, save_checkpoint

FAST: dict[str, Any] = {"decoder": "fpn", "lr": 3e-3}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("pairs") / "set", (8, 3))


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{name}.safetensors")


@pytest.fixture(scope="module")
def trained(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("trained") / "run"
    return segment(segment_options(pairs, output, **FAST, epochs=5, dice=0.5, ema_decay=0.5, layer_decay=0.8))


def test_it_learns_and_says_so(trained: Any, pairs: Path) -> None:
    assert trained.metrics[-1]["train_loss"] < 0.6 * trained.metrics[0]["train_loss"]
    assert trained.best_miou == max(row["val_miou"] for row in trained.metrics) > 60
    assert trained.images == (8, 3)
    assert all(0 < row["feature_diversity"] < 1 for row in trained.metrics)
    names = {path.name for path in trained.folder.iterdir()}
    assert {"metrics.jsonl", "loss.png", "confusion_matrix.png", "config.yaml", "environment.json"} <= names
    found = load_segmenter(trained.folder)
    saved = found.model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in trained.model.state_dict().items())
    assert found.window == (32, 32)


def test_a_report_knows_what_it_is(trained: Any) -> None:
    run = read_run(trained.folder, "run")
    assert (run.kind, run.notices, run.classes) == ("segmentation", [], ("0", "1", "2"))
    assert run.again.startswith("fcmae segment train --config ")
    assert ("best mIoU", f"{trained.best_miou:.2f} % (epoch {trained.best_epoch})") in facts(run)


def test_validation_is_the_evaluation_of_windows_side_by_side(trained: Any, pairs: Path) -> None:
    from convnextv2.data.decoding import USUAL
    from convnextv2.segmentation.pairs import PairSource, find_files

    found = load_segmenter(trained.folder)
    files = find_files(pairs / "val", 3, USUAL)
    source = PairSource(files.images, files.masks, 3, found.classes, USUAL)
    scores, unreadable = evaluate_pairs(found, source, Running(Windows((32, 32), 0.0), batch_size=3))
    assert (scores.miou, scores.accuracy) == (trained.best_miou, trained.best["accuracy"])
    assert not unreadable
    blended, _ = evaluate_pairs(found, source, Running(Windows((32, 32), 0.5)))
    assert blended.miou != scores.miou


def test_learning_rates_fall_with_the_layers_of_the_encoder_alone(pairs: Path, tmp_path: Path) -> None:
    task = SegmentTask(segment_options(pairs, tmp_path / "run", layer_decay=0.5, **FAST))
    task.resolve(None)
    task.data()
    model = task.model()
    scales = {
        id(p): (group["lr_scale"], group["weight_decay"]) for group in task.groups(model) for p in group["params"]
    }
    assert len(scales) == len(list(model.parameters()))
    named = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    assert named["head.weight"] == named["decoder.p5.weight"] == (1.0, 0.05)
    assert named["norms.0.weight"] == (1.0, 0.0)
    assert named["encoder.stages.3.0.dwconv.weight"] == (0.5, 0.05)
    assert named["encoder.downsample_layers.0.0.weight"] == (0.5**4, 0.05)


def test_it_starts_from_a_pretraining_and_from_another_run(trained: Any, pairs: Path, tmp_path: Path) -> None:
    options = segment_options(pairs, tmp_path / "run", epochs=1)
    network = create_fcmae(options_encoder(), img_size=(64, 48), decoder_dim=16)
    about = {"mean": [0.4] * 3, "std": [0.3] * 3, "img_size": [64, 48]}
    save_checkpoint(tmp_path / "pre.safetensors", network, network.config, about)
    lines: list[str] = []
    left_open = {"depths": None, "dims": None, "img_size": None, "patch_size": None}
    result = segment(replace(options, init=tmp_path / "pre.safetensors", **left_open), log=lines.append)
    assert any("tensors loaded; freshly initialised: decoder, head" in line for line in lines)
    found = load_segmenter(result.folder)
    assert found.statistics == ((0.4,) * 3, (0.3,) * 3)
    assert found.window == (64, 48)
    assert found.model.config.encoder == options_encoder()
    again = replace(options, init=trained.folder, output=tmp_path / "again", decoder="fpn", lr=1e-12)
    result = segment(again, log=lines.append)
    assert "freshly initialised: nothing" in lines[-3] + lines[-4]
    assert result.best_miou == pytest.approx(trained.best_miou, abs=0.5)
    with pytest.raises(CheckpointError, match="do not belong to a ConvNeXt V2"):
        finetune(finetune_like(pairs, tmp_path / "fine", trained.folder))


def options_encoder() -> Any:
    from convnextv2 import EncoderConfig

    return EncoderConfig((1, 1, 1, 1), (8, 8, 16, 16), patch_size=16)


def finetune_like(data: Path, output: Path, init: Path) -> Any:
    from convnextv2.training import FinetuneOptions

    return FinetuneOptions(data=data, output=output, init=init, device="cpu")


def test_a_resumed_run_is_the_run(pairs: Path, tmp_path: Path) -> None:
    def stop(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
        for number, item in enumerate(items):
            if description.startswith("epoch 2/") and number == 1:
                signal.raise_signal(signal.SIGTERM)
            yield item

    changes = {
        **FAST,
        "epochs": 3,
        "drop_path": 0.3,
        "color_jitter": 0.3,
        "ema_decay": 0.9,
        "min_steps": 9,
        "workers": 2,
    }
    whole = segment(segment_options(pairs, tmp_path / "whole", **changes))
    assert [row["step"] for row in whole.metrics] == [4, 8, 12]  # two passes an epoch
    with pytest.raises(RunStoppedError, match=r"step 6 is saved \(epoch 2\)"):
        segment(segment_options(pairs, tmp_path / "parts", **changes), progress=stop)
    parts = segment(segment_options(pairs, tmp_path / "parts", **{**changes, "workers": 0}, resume=True))
    same = ("train_loss", "val_miou", "val_accuracy", "step")
    assert [[row[name] for name in same] for row in parts.metrics] == [
        [row[name] for name in same] for row in whole.metrics
    ]
    assert all(torch.equal(value, weights(parts.folder)[name]) for name, value in weights(whole.folder).items())


def kill_in_the_second_epoch() -> None:
    original = SegmentTask.loss

    def loss(self: SegmentTask, model: Any, batch: Any) -> Any:
        if self.draws.epoch == 1 and self.draws.first == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, model, batch)

    SegmentTask.loss = loss  # type: ignore[method-assign]


def command(pairs: Path, output: Path, *more: object) -> list[object]:
    tiny = [*launching.TINY, "--decoder", "fpn", "--decoder-width", "64", "--tracker", "none", "--device", "cpu"]
    return ["train", *tiny, "--lr", "3e-3", "--epochs", "3", "--data", pairs, "--output", output, *more]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_processes_share_one(pairs: Path, tmp_path: Path) -> None:
    script = launching.SCRIPTS / "segment.py"
    one = "--batch-size", "2", "--accum", "2"
    forked.run(script, *command(pairs, tmp_path / "whole", *one), env=launching.ENVIRONMENT).check_returncode()
    arguments = command(pairs, tmp_path / "killed", *one, "--save-steps", "1", "--resume", "auto")
    killed = forked.run(script, *arguments, env=launching.ENVIRONMENT, before=kill_in_the_second_epoch)
    assert killed.returncode == -signal.SIGKILL
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) == 1
    again = forked.run(script, *arguments, env=launching.ENVIRONMENT)
    assert again.returncode == 0, again.stderr
    assert "resuming after epoch 1" in again.stderr
    assert "best mIoU" in again.stdout
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(value, weights(tmp_path / "killed")[name]) for name, value in whole.items())

    launching.run(2, "segment", *command(pairs, tmp_path / "shared", "--batch-size", "2"))
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "shared")
    ]
    for row, other in zip(*rows, strict=True):
        assert other["step"] == row["step"]
        assert other["train_loss"] == pytest.approx(row["train_loss"], rel=1e-5)
        assert other["val_miou"] == pytest.approx(row["val_miou"], abs=0.2)  # rounding turns the nearest decisions


def test_an_image_has_its_own_loss_in_any_batch() -> None:
    from segmentation_models_pytorch.losses import DiceLoss

    torch.manual_seed(0)
    logits, target = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 8, 8))
    target[1, :, :5], target[2] = 255, 255
    dice = DiceLoss("multiclass", ignore_index=255)
    for given in (None, dice):
        together = image_losses(logits, target, 0.1, 0.5, given)
        alone = [image_losses(logits[i : i + 1], target[i : i + 1], 0.1, 0.5, given)[0] for i in range(4)]
        torch.testing.assert_close(together, torch.stack(alone))
        expected = torch.nn.functional.cross_entropy(logits[1:2], target[1:2], ignore_index=255, label_smoothing=0.1)
        expected = expected + (0 if given is None else 0.5 * dice(logits[1:2], target[1:2]))
        torch.testing.assert_close(together[1], expected)
        assert together[2] == 0


def test_a_batch_of_ignored_pixels_does_no_harm(tmp_path: Path) -> None:
    root = make_parts(tmp_path / "set", (4, 2))
    for path in (root / "train" / "masks").iterdir():
        Image.fromarray(np.full((40, 48), 255, np.uint8)).save(path)
    options = segment_options(root, tmp_path / "run", **FAST, dice=1.0, epochs=1, classes="ground,disc,square")
    result = segment(options)
    assert result.metrics[0]["train_loss"] == 0
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "digits"}, "`data` digits has no masks"),
        ({"views": 2}, "`views` would change images and not their masks"),
        ({"cache": "cache"}, "`cache` would change"),
        ({"reduce_jpeg": True}, "`reduce_jpeg` would change"),
        ({"augment_on": "device"}, "`augment_on` would change"),
        ({"resize": "torchvision"}, "`resize` would change"),
        ({"img_size": 36}, "not divisible by the patch size 8"),
        ({"scale": (2.0, 0.5)}, "`scale` must be two factors"),
        ({"dice": -1.0}, "`dice` must be at least 0"),
        ({"hflip": 2.0}, "`hflip` must be a probability"),
        ({"decoder": "deeplab"}, "`decoder` must be one of upernet, fpn, unet"),
        ({"decoder_width": 100}, "a multiple of 64"),
        ({"ignore_index": -2}, r"`ignore_index` must be in \[-1, 65535\]"),
        ({"classes": "a,,b"}, "`classes` should be names separated by commas"),
        ({"classes": "a,b"}, "holds the value 2 in row"),
        ({"classes": "a,b,a"}, "two classes have the same name"),
    ],
)
def test_options_are_refused_before_anything_is_written(
    changes: dict[str, Any], words: str, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        segment(SegmentOptions(**{**SMALL, "data": pairs, "output": tmp_path / "run", **changes}))
    assert not (tmp_path / "run").exists()


def test_a_state_of_another_task_is_told(pairs: Path, trained: Any, tmp_path: Path) -> None:
    options = segment_options(pairs, trained.folder, **FAST, resume=True, decoder_width=128)
    with pytest.raises(ValueError, match=r"another network \(decoder_width 64 there, 128 here\)"):
        segment(options)

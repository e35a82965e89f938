import json
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import compile_without_inductor, make_images, pretrain_options, weights

from convnextv2 import FCMAE
from convnextv2.data.sources import DataError
from convnextv2.training.device import mixed_precision
from convnextv2.training.pretraining import PretrainTask, pretrain
from convnextv2.training.signals import RunStoppedError
from convnextv2.training.watching import DivergedError
from convnextv2.weights.checkpoint import CheckpointError, load_checkpoint
from convnextv2.weights.loading import load_model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set")


def stop_in_epoch(number: int, signum: int = signal.SIGTERM) -> Any:
    """A progress bar that sends this process a signal before the second batch of an epoch."""

    def progress(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
        for index, item in enumerate(items):
            if index == 1 and description.startswith(f"epoch {number}/"):
                os.kill(os.getpid(), signum)
            yield item

    return progress


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.pictures
def test_a_run_writes_everything_and_its_loss_falls(images: Path, tmp_path: Path) -> None:
    output, lines = tmp_path / "run", []
    options = pretrain_options(images, output, epochs=6, blr=0.5, reconstruct_every=4)
    summary = pretrain(options, log=lines.append)
    assert summary.epochs == 6
    assert summary.last_loss < summary.first_loss - 0.02
    rows = metrics(output)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows] == [3, 6, 9, 12, 15, 18]
    assert {"loss", "lr", "seconds", "images_per_s", "feature_diversity"} <= rows[0].keys()
    assert all(0 < row["feature_diversity"] <= 0.5 for row in rows)
    assert {"weight_norm", "memory_mib", *(f"feature_diversity_{number}" for number in (1, 2, 3, 4))} <= rows[0].keys()
    assert sorted(p.name for p in (output / "reconstructions").iterdir()) == ["epoch_0004.png", "epoch_0006.png"]
    assert (output / "loss.png").stat().st_size > 1000
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["last.safetensors", "state", "state.1"]
    assert isinstance(load_model(output), FCMAE)
    assert load_checkpoint(output).metadata["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert any("15 images" in line for line in lines) and any("4×4 patches an image" in line for line in lines)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_and_resumed_run_is_bit_identical(images: Path, tmp_path: Path, signum: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    extra = {"epochs": 3, "drop_path": 0.2, "accum": 2, "clip_grad": 1.0}
    pretrain(pretrain_options(images, whole, **extra))
    before = signal.getsignal(signum)
    with pytest.raises(RunStoppedError, match=r"step 2 is saved \(epoch 2\), continue") as stopped:
        pretrain(pretrain_options(images, parts, **extra), progress=stop_in_epoch(2, signum))
    assert stopped.value.status == 128 + signum
    assert signal.getsignal(signum) is before
    assert len(metrics(parts)) == 1
    torch.rand(7)  # a resumed process has another past
    pretrain(pretrain_options(images, parts, **extra, resume=True))
    expected, got = weights(whole), weights(parts)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    volatile = ("seconds", "images_per_s", "data_wait", "memory_mib")
    assert [{k: v for k, v in row.items() if k not in volatile} for row in metrics(whole)] == [
        {k: v for k, v in row.items() if k not in volatile} for row in metrics(parts)
    ]


def test_a_signal_after_the_last_step_is_not_lost(images: Path, tmp_path: Path) -> None:
    def log(line: str) -> None:
        lines.append(line)
        if line.startswith("epoch 2/2"):
            signal.raise_signal(signal.SIGINT)

    lines: list[str] = []
    options = pretrain_options(images, tmp_path / "run", epochs=2)
    with pytest.raises(RunStoppedError, match="2 epochs are saved"):  # a program of several runs is to end, too
        pretrain(options, log=log)
    resumed = pretrain(replace(options, resume=True), log=log)
    assert "nothing to do: 2 epochs are done" in lines
    assert resumed.epochs == len(resumed.metrics) == 2


def test_epochs_and_seeds_differ_in_order_and_masks(images: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        pretrain(pretrain_options(images, tmp_path / str(seed), lr=1e-12, seed=seed, epochs=3))
    losses = [row["loss"] for seed in "01" for row in metrics(tmp_path / seed)]
    assert len({round(loss, 7) for loss in losses}) == 6  # the weights hardly move: masks and crops make the difference


@pytest.mark.parametrize("killed_at", ["between renames", "before the old is deleted", "while writing"])
def test_resume_copes_with_a_kill_while_the_state_is_swapped(images: Path, tmp_path: Path, killed_at: str) -> None:
    output, whole = tmp_path / "run", tmp_path / "whole"
    pretrain(pretrain_options(images, whole, epochs=3))
    with pytest.raises(RunStoppedError):
        pretrain(pretrain_options(images, output, epochs=3), progress=stop_in_epoch(2))
    state = output / "checkpoints" / "state"
    new, old = state.with_name("state.tmp"), state.with_name("state.old")
    new.mkdir()
    (new / "model.safetensors").write_bytes(b"half")
    if killed_at == "between renames":
        state.rename(old)
    elif killed_at == "before the old is deleted":
        old.mkdir()
        (old / "progress.json").write_text("{}")
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "loss": 9.0}\n{"epoch": 3, "lo')
    pretrain(pretrain_options(images, output, epochs=3, resume=True))
    assert not new.exists()
    assert not old.exists()
    assert [row["epoch"] for row in metrics(output)] == [1, 2, 3]
    assert metrics(output)[1]["loss"] != 9.0
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(output).items())


def test_an_occupied_folder_is_refused_and_overwrite_replaces_only_runs(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = pretrain_options(images, output, epochs=1)
    pretrain(options)
    (output / "notes.txt").write_text("mine")
    before = weights(output)
    with pytest.raises(ValueError, match="not empty; continue that run with `resume`"):
        pretrain(replace(options, seed=1))
    assert all(torch.equal(before[name], value) for name, value in weights(output).items())
    pretrain(replace(options, seed=1, overwrite=True))
    assert len(metrics(output)) == 1
    assert (output / "notes.txt").read_text() == "mine"
    assert not all(torch.equal(before[name], value) for name, value in weights(output).items())


def test_resume_needs_a_state_of_the_same_network(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(ValueError, match="holds no state to resume from"):
        pretrain(pretrain_options(images, output, resume=True))
    assert not output.exists()
    pretrain(pretrain_options(images, output, epochs=1))
    with pytest.raises(ValueError, match=r"another network \(encoder.dims \[8, 8, 16, 16\] there, \[8, 8, 8, 8\] here"):
        pretrain(pretrain_options(images, output, dims=(8, 8, 8, 8), resume=True))
    lines: list[str] = []
    pretrain(pretrain_options(images, output, epochs=1, resume=True), log=lines.append)
    assert any("nothing to do: 1 epochs are done" in line for line in lines)
    (output / "checkpoints" / "state" / "optimizer.bin").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="cannot be resumed from"):
        pretrain(pretrain_options(images, output, epochs=2, resume=True))


def test_init_takes_weights_only(images: Path, tmp_path: Path) -> None:
    pretrain(pretrain_options(images, tmp_path / "first", epochs=1))
    lines: list[str] = []
    options = pretrain_options(images, tmp_path / "second", epochs=1, lr=1e-30, init=str(tmp_path / "first"))
    pretrain(options, log=lines.append)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.allclose(first[name], second[name], atol=1e-12) for name in first)
    assert any("nothing is freshly initialised" in line for line in lines)
    other = replace(options, decoder_dim=8, output=str(tmp_path / "third"))
    pretrain(other, log=lines.append)
    assert any("the decoder is freshly initialised" in line for line in lines)
    with pytest.raises(CheckpointError, match="choose the model that the checkpoint is of"):
        pretrain(replace(options, dims=(8, 8, 8, 8), output=str(tmp_path / "fourth")))
    assert not (tmp_path / "fourth").exists()


def test_divergence_stops_with_the_step_and_keeps_the_last_good_state(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    pretrain(pretrain_options(images, output, epochs=1))
    good = weights(output)
    with pytest.raises(DivergedError, match=r"at step \d+ \(epoch 2.*epoch 1 is kept.*try a smaller `blr`"):
        pretrain(pretrain_options(images, output, epochs=3, resume=True, lr=1e30, warmup_epochs=0.0))
    assert all(torch.equal(good[name], value) for name, value in weights(output).items())
    assert len(metrics(output)) == 1
    assert json.loads((output / "checkpoints/state/progress.json").read_text())["epoch"] == 1


@pytest.mark.parametrize(
    ("changes", "same"),
    [({"crop_scale": (1.0, 1.0), "hflip": 0.0}, True), ({"crop_scale": (1.0, 1.0)}, False), ({}, False)],
)
def test_crops_and_flips_are_those_asked_for(tmp_path: Path, changes: dict[str, Any], same: bool) -> None:
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (4, 40, 40, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    task = PretrainTask(pretrain_options(tmp_path, tmp_path / "run", **changes))
    task.resolve(None)
    (dataset, *_) = task.data()
    seen = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        seen.append(torch.stack([dataset[number] for number in range(len(dataset))]))
    assert torch.equal(*seen) == same


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio=0.0 keeps"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0 keeps"),
        ({"mask_ratio": float("nan")}, "mask_ratio=nan keeps"),
        ({"img_size": (30, 32)}, "not divisible by the patch size 8"),
        ({"model": "convnextv2_nano2", "depths": None, "dims": None}, "unknown model"),
        ({"dims": None}, "give both or neither"),
        ({"backend": "nothing"}, "unknown backend"),
        ({"epochs": 0}, "`epochs` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"lr": float("nan")}, "`lr` must be positive"),
        ({"warmup_epochs": -1.0}, "`warmup_epochs`"),
        ({"betas": (0.9, 1.0)}, "`betas`"),
        ({"device": "gpu"}, "`device` must be"),
        ({"tracker": "paper"}, "`tracker` must be one of"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"optimizer": "adamx"}, "unknown optimizer"),
        ({"reconstruct_every": -1}, "`reconstruct_every`"),
        ({"crop_scale": (0.0, 1.0), "reduce_jpeg": True}, "crop_scale must be"),
        ({"compile": "fast"}, "`compile` must be one of"),
        ({"compile": "reduce-overhead", "accum": 2}, "exclude each other: a CUDA graph"),
        ({"compile": "default", "backend": "minkowski"}, "minkowski cannot be traced"),
    ],
)
def test_bad_options_are_refused_before_a_file_is_written(
    images: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain(pretrain_options(images, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_bad_data_and_outputs_are_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        pretrain(pretrain_options(tmp_path / "empty", tmp_path / "run"))
    with pytest.raises(ValueError, match="no such folder"):
        pretrain(pretrain_options(tmp_path / "nowhere", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        pretrain(pretrain_options(images, tmp_path / "file"))


def test_a_batch_larger_than_the_data_is_lowered_with_a_notice(images: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    pretrain(pretrain_options(images, tmp_path / "run", batch_size=100, epochs=1), log=lines.append)
    assert any("`batch_size` 100 lowered to 15" in line for line in lines)
    assert metrics(tmp_path / "run")[0]["step"] == 1


def test_workers_do_not_change_the_result(images: Path, tmp_path: Path) -> None:
    for workers in (0, 1):
        pretrain(pretrain_options(images, tmp_path / str(workers), workers=workers))
    assert all(torch.equal(value, weights(tmp_path / "1")[name]) for name, value in weights(tmp_path / "0").items())


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = pretrain_options(images, tmp_path / "eager", backend="auto")  # the 49 taps of `reference` are all traced
    pretrain(options)
    modes, counters = compile_without_inductor(monkeypatch), torch._dynamo.utils.counters
    counters.clear()
    pretrain(replace(options, output=tmp_path / "compiled", compile="reduce-overhead", reconstruct_every=1))
    assert modes == ["reduce-overhead"]
    assert counters["stats"]["unique_graphs"] == 1  # pictures, whose shapes are others, make none
    for eager, compiled in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-5)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "eager").keys()


def test_auto_precision_is_bfloat16_on_cuda_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = pretrain_options(images, tmp_path / "run", device="auto")
    for cuda, supported, expected in ((False, True, "no"), (True, False, "no"), (True, True, "bf16")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        assert mixed_precision(options) == expected
        assert mixed_precision(replace(options, device="cpu")) == "no"
        assert mixed_precision(replace(options, precision="fp16")) == "fp16"


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_off_unless_asked_for(images: Path, tmp_path: Path, tf32: bool) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        pretrain(pretrain_options(images, tmp_path / "run", epochs=1, tf32=tf32))
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_a_full_disk_keeps_the_old_state(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    pretrain(pretrain_options(images, output, epochs=1))

    def full(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos 83200 vs 83092")  # torch.save on a full disk

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError, match="is the disk full"):
        pretrain(pretrain_options(images, output, epochs=2, resume=True))
    state = output / "checkpoints" / "state"
    assert json.loads((state / "progress.json").read_text())["epoch"] == 1
    assert not state.with_name("state.tmp").exists()

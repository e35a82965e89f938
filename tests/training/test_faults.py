"""What goes wrong in a run is told in a line that names it, and nothing is lost but what is said."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from torch.utils.data import get_worker_info
from train_helpers import make_images, pretrain_options, weights

from convnextv2.data import listings
from convnextv2.data.now_reading import NowReading
from convnextv2.data.sources import DataError, FileSource
from convnextv2.training import pretrain
from convnextv2.training import run as runs
from convnextv2.training.pretraining import PretrainTask
from convnextv2.training.watching import DivergedError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set")


def test_a_loading_process_that_dies_names_its_image(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FileSource.load

    def load(self: FileSource, index: int) -> Any:
        if get_worker_info() is not None and self.paths[index].name == "3.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    monkeypatch.setattr(FileSource, "load", load)
    with pytest.raises(
        DataError,
        match=r"(is killed by signal: Killed|exited unexpectedly) while it read .*3\.png; take such a file out",
    ):
        pretrain(pretrain_options(images, tmp_path / "run", workers=2))


def test_what_is_being_read_is_known_of_loading_processes_alone() -> None:
    reading = NowReading()
    for _ in range(2):
        reading.begin(3)
        assert reading.of(os.getpid()) is None
        reading.share()


@pytest.fixture
def not_finite(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches of a pre-training, from 0, whose loss is to be NaN."""
    bad: list[int] = []
    original, number = PretrainTask.loss, iter(range(1000))

    def loss(self: PretrainTask, model: Any, batch: Any) -> Any:
        found, size = original(self, model, batch)
        return (found * torch.nan if next(number) in bad else found), size

    monkeypatch.setattr(PretrainTask, "loss", loss)
    return bad


def test_a_loss_that_is_not_finite_leaves_a_record(images: Path, tmp_path: Path, not_finite: list[int]) -> None:
    not_finite.append(4)
    with pytest.raises(DivergedError, match=r"the loss is nan at step 4 \(epoch 2.*the checkpoint of epoch 1 is kept"):
        pretrain(pretrain_options(images, tmp_path / "run", epochs=3, lr=1e-3))
    told = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert (told["step"], told["epoch"]) == (4, 2)
    assert told["learning_rate"] == pytest.approx(1e-3, rel=0.5)
    assert [update["step"] for update in told["updates"]] == [0, 1, 2, 3, 4]
    assert told["updates"][0]["gradient_norm"] > 0
    assert told["updates"][-1]["loss"] is None
    assert len(told["files"]) == 4
    assert all((images / file).is_file() or Path(file).is_file() for file in told["files"])
    assert told["weight_norms"]["encoder.stages.0"] > 0


def test_updates_that_are_not_finite_are_left_out_where_that_is_asked_for(
    images: Path, tmp_path: Path, not_finite: list[int]
) -> None:
    not_finite += [1, 3]
    options = pretrain_options(images, tmp_path / "run", epochs=2, skip_steps=2)
    result = pretrain(options)
    assert [row["skipped"] for row in result.metrics] == [1, 2]
    assert [row["step"] for row in result.metrics] == [3, 6]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())
    assert json.loads((tmp_path / "run/checkpoints/state/progress.json").read_text())["skipped"] == 2


def test_too_many_updates_that_are_not_finite_end_a_run(images: Path, tmp_path: Path, not_finite: list[int]) -> None:
    not_finite += [0, 1]
    with pytest.raises(DivergedError, match="2 gradients were not finite, the last at step 1"):
        pretrain(pretrain_options(images, tmp_path / "run", skip_steps=1))
    assert (tmp_path / "run" / "diverged.json").is_file()


def test_a_gradient_scaler_leaves_overflows_out_itself(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with float16 on a GPU, whose scale begins far too high."""
    make, scalers = runs.make_accelerator, list[Any]()

    def scaled(options: Any) -> Any:
        accelerator = make(options)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**scale)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        scalers.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(runs, "make_accelerator", scaled)
    monkeypatch.setattr("convnextv2.training.pretraining.PretrainTask.loss", overflowing(PretrainTask.loss))
    scale = 20
    rows = pretrain(pretrain_options(images, tmp_path / "run", epochs=2, skip_steps=1)).metrics
    assert "skipped" not in rows[-1]
    assert scalers[0].get_scale() == 2.0**14, "lowered until nothing was too large"
    scale = 3
    with pytest.raises(DivergedError, match="2 gradients were not finite, the last at step 5"):
        pretrain(pretrain_options(images, tmp_path / "other", epochs=9, skip_steps=1, batch_size=2, lr=1e-9))


def overflowing(original: Any) -> Any:
    """A loss whose gradient is not finite where the scale is above 2 ** 14, or between 2 ** -9 and 2 ** 10."""

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Any) -> Any:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, scale: Any) -> Any:
            return scale * (torch.inf if scale > 2.0**14 or 2.0**-9 < scale < 2.0**10 else 1)

    def loss(self: Any, model: Any, batch: Any) -> Any:
        found, size = original(self, model, batch)
        return Overflow.apply(found), size

    return loss


def pretraining(images: Path, output: Path) -> tuple[object, ...]:
    own = "--backend", "reference", "--decoder-dim", 16, "--reconstruct-every", 0, "--epochs", 3, "--batch-size", 2
    return *launching.TINY, *own, "--save-steps", 1, "--data", images, "--output", output


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hangs", "fails"])
def test_a_process_that_is_lost_ends_the_run_in_a_line(images: Path, tmp_path: Path, fault: str) -> None:
    given = *pretraining(images, tmp_path / "run"), "--timeout-minutes", 0.05
    first, second = launching.processes(2, "pretrain", *given, before=getattr(launching, fault))
    done = first.finish(120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: process 0: another process of the run ended" in done.stderr.splitlines()[-1]
    if fault == "fails":
        other = second.finish(60)
        assert other.stderr == "error: /data/b.png: the cable is out\n"
        assert other.returncode == 2
    else:
        second.send_signal(signal.SIGKILL)
        second.finish(60)
    # Two updates were made, and saved.
    assert json.loads((tmp_path / "run/checkpoints/state/progress.json").read_text())["step"] == 2


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job_saves_and_stops(images: Path, tmp_path: Path) -> None:
    """As Slurm sends it before it takes the machine away: loading processes leave it to the one that trains."""
    given = *pretraining(images, tmp_path / "run"), "--workers", 2, "--epochs", 1000
    (process,) = launching.processes(1, "pretrain", *given)
    state, deadline = tmp_path / "run/checkpoints/state/progress.json", time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process._process.pid is not None
    workers = children(process._process.pid)
    assert len(workers) == 2
    for pid in [*workers, process._process.pid]:
        os.kill(pid, signal.SIGTERM)
    done = process.finish(60)
    assert done.returncode == 143, done.stderr
    assert "stopped by SIGTERM; step " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_files_that_changed_in_place_are_told_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listings, "LEAST", 5)
    monkeypatch.setattr(listings, "SETTLED_NS", -(10**12))  # the folders are as if they had been written long before
    images, told = make_images(tmp_path / "set"), []
    for run in range(3):
        if run == 1:
            os.utime(images / "red" / "0.png", (5, 5))
        lines: list[str] = []
        pretrain(pretrain_options(images, tmp_path / f"run{run}"), log=lines.append)
        told.append([line for line in lines if "is not as it was listed" in line])
    assert [len(lines) for lines in told] == [0, 1, 0]
    assert "1 file(s) are new or have changed, 1 are gone or have changed" in told[1][0]

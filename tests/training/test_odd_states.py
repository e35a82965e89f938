"""States that no run wrote, and signals that come at odd moments."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_helpers import make_images, pretrain_options

from convnextv2.training import RunStoppedError, pretrain
from convnextv2.training.keeping import Keeper
from convnextv2.training.run_folder import RunFolder
from convnextv2.training.saved_state import read_state
from convnextv2.training.signals import SAVE, StopSignals
from convnextv2.training.so_far import SoFar, is_so_far
from convnextv2.training.states import find_state, newest_whole, state_folders, take_up, write_state
from convnextv2.weights.checkpoint import CheckpointError


def write(checkpoints: Path, step: int, keep: int = 2) -> None:
    files = {"model.safetensors": {"a": torch.ones(3)}, "optimizer.bin": {"state": {}}}
    write_state(checkpoints, files, {"epoch": 1, "step": step, "config": {}}, keep)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two states, of steps 1 and 2."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for step in (1, 2):
        write(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["state", "state.1"])
def test_a_state_that_a_link_leads_to_takes_its_turn_and_stays(run: Path, tmp_path: Path, name: str) -> None:
    checkpoints, elsewhere = run / "checkpoints", tmp_path / "elsewhere"
    shutil.move(checkpoints / name, elsewhere)
    (checkpoints / name).symlink_to(elsewhere)
    found = newest_whole(run)
    assert found is not None
    take_up(checkpoints, found["state"])
    for step in (3, 4):
        write(checkpoints, step)
    assert [(path.name, read_state(path)["step"]) for path in state_folders(checkpoints)] == [
        ("state", 4), ("state.1", 3),
    ]  # fmt: skip
    assert read_state(elsewhere)["step"] == (2 if name == "state" else 1)


@pytest.mark.parametrize("what", ["file", "dangling", "loop"])
@pytest.mark.parametrize("name", ["state", "state.1", "state.tmp"])
def test_what_only_has_the_name_of_a_state_is_passed_over(run: Path, name: str, what: str) -> None:
    checkpoints = run / "checkpoints"
    odd = checkpoints / name
    if name != "state.tmp":
        shutil.rmtree(odd)
    if what == "file":
        odd.write_text("x")
    else:
        odd.symlink_to(odd if what == "loop" else "nowhere")
    found = newest_whole(run)
    assert found is not None
    assert (found["step"], "damaged" in found) == ((1, True) if name == "state" else (2, False))
    take_up(checkpoints, found["state"])
    for step in (3, 4):
        write(checkpoints, step)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["state", "state.1"]
    assert [read_state(path)["step"] for path in state_folders(checkpoints)] == [4, 3]


def test_names_that_are_not_of_states_are_left_alone(run: Path) -> None:
    checkpoints = run / "checkpoints"
    odd = [f"state.{name}" for name in ("0", "01", "1e3", "\N{ARABIC-INDIC DIGIT THREE}")]
    for name in odd:
        shutil.copytree(checkpoints / "state", checkpoints / name)
    write(checkpoints, 3)
    assert sorted(path.name for path in checkpoints.iterdir()) == sorted(["state", "state.1", *odd])
    for folder in state_folders(checkpoints):
        shutil.rmtree(folder)
    (checkpoints / "state").write_text("no state")
    assert find_state(run) is None


@pytest.mark.parametrize("name", ["x.bin", "checksums.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_in_a_state_is_refused_unread(run: Path, name: str, make: Any) -> None:
    state = run / "checkpoints" / "state"
    (state / name).unlink(missing_ok=True)
    make(state / name)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be resumed from \(is no file"):
        read_state(state)


@pytest.mark.parametrize(
    "change", [{"loss": 10**400}, {"images": 10**400}, {"losses": 2**53}, {"batches": True}, {"seconds": -1.0},
               {"waited": -1e9}, {"norm": -1.0}],
)  # fmt: skip
def test_numbers_that_no_epoch_comes_to_are_refused(change: dict[str, Any]) -> None:
    assert not is_so_far({**vars(SoFar()), **change})


def raise_at(step: int, *signals: int, pause: float = 0.0) -> Any:
    """As ``progress`` of a run: raises these signals, one by one, when so many batches were taken."""
    taken = iter(range(10**6))

    def progress(items: Any, total: int, description: str) -> Any:
        for item in items:
            if next(taken) == step:
                for number in signals:
                    signal.raise_signal(number)
                    time.sleep(pause)
            yield item

    return progress


def test_a_signal_passed_on_by_a_launcher_is_no_second_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_images(tmp_path / "images")
    twice = signal.SIGINT, signal.SIGINT
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background ignore it
    try:
        with pytest.raises(RunStoppedError, match="step 2 is saved"):
            pretrain(pretrain_options(images, tmp_path / "run"), progress=raise_at(1, *twice))
        monkeypatch.setattr("convnextv2.training.handlers.AT_ONCE", 0.01)
        with pytest.raises(KeyboardInterrupt):
            pretrain(pretrain_options(images, tmp_path / "again"), progress=raise_at(1, *twice, pause=0.02))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_request_to_save_ends_no_run_that_is_set_up(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    previous = signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # which ends the process
    try:
        told: list[str] = []

        def log(line: str) -> None:
            if line.startswith("data: "):
                signal.raise_signal(signal.SIGUSR1)
            told.append(line)

        with pytest.raises(RunStoppedError):
            options = pretrain_options(images, tmp_path / "run", epochs=1, keep_states=9)
            pretrain(options, log=log, progress=raise_at(1, signal.SIGTERM))
        assert [read_state(path)["step"] for path in state_folders(tmp_path / "run" / "checkpoints")] == [2]
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_a_request_to_save_is_met_once_and_none_is_lost(tmp_path: Path) -> None:
    """The second one comes while the other processes are waited for."""
    came: list[int] = []

    class Slow:
        def highest(self, value: int) -> int:
            if not came:
                signal.raise_signal(signal.SIGUSR1)
            came.append(value)
            return value

    options, alone = pretrain_options("digits", tmp_path), SimpleNamespace(is_main_process=True)
    with StopSignals() as stop:
        keeper = Keeper(RunFolder(tmp_path), options, alone, Slow(), stop, torch.nn.Identity(), {})  # type: ignore[arg-type]
        assert [keeper.asked(step) for step in (1, None, 2, 3)] == [0, SAVE, SAVE, 0]
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert [keeper.asked(step) for step in (4, 5)] == [signal.SIGTERM + SAVE] * 2
    keeper.close()


def test_a_state_of_another_optimizer_is_told(tmp_path: Path) -> None:
    images, output = make_images(tmp_path / "images"), tmp_path / "run"
    pretrain(pretrain_options(images, output, epochs=1))
    for other, kind in (("sgd", "SGD"), ("lion", "Lion")):  # of which each takes what AdamW's state is made of
        with pytest.raises(CheckpointError, match=f"the state is of another `optimizer`, AdamW, not {kind}"):
            pretrain(pretrain_options(images, output, resume=True, optimizer=other))
    pretrain(pretrain_options(images, output, resume=True))

"""States on the disk, and runs that are asked to save, killed, or whose state is damaged."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import launching
import pytest
import torch
from train_helpers import finetune_options, make_images, pretrain_options, weights

from convnextv2.training import RunStoppedError, finetune, pretrain
from convnextv2.training.saved_state import read_state
from convnextv2.training.so_far import SoFar, is_so_far
from convnextv2.training.states import Writer, newest_whole, state_folders, take_up, write_state
from convnextv2.weights.checkpoint import CheckpointError

STEPS = {"pretrain": 7, "finetune": 6}
"""Updates of an epoch of fifteen images, or of twelve."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set")


def stop_at(step: int, signum: signal.Signals = signal.SIGTERM) -> Callable[..., Any]:
    """As ``progress`` of a run: raises a signal when so many batches were taken in all epochs."""
    taken = iter(range(10**6))

    def progress(items: Any, total: int, description: str) -> Any:
        for item in items:
            if next(taken) == step:
                signal.raise_signal(signum)
            yield item

    return progress


def options(task: str, images: Path, output: Path, **changes: Any) -> Any:
    given = {"epochs": 3, "batch_size": 2, "drop_path": 0.3, **changes}
    if task == "pretrain":
        return pretrain_options(images, output, **given)
    return finetune_options(images, output, **{"mixup": 0.8, "cutmix": 1.0, "ema_decay": 0.9, **given})


RUN = {"pretrain": pretrain, "finetune": finetune}


def same_weights(first: Path, second: Path, *names: str) -> bool:
    return all(
        torch.equal(value, weights(second, name)[part])
        for name in names
        for part, value in weights(first, name).items()
    )


def rows(output: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock, or on what the process did before."""
    volatile = {"seconds", "images_per_s", "data_wait", "memory_mib", "probe_seconds"}
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in volatile} for line in lines]


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_at_any_step_goes_on_there(images: Path, tmp_path: Path, task: str, workers: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    RUN[task](options(task, images, whole))
    steps = STEPS[task]
    taken = 0
    for stop in (0, 2, steps - 3, 1, steps + 1) if workers == 0 else (2,):  # the third ends at the end of an epoch
        with pytest.raises(RunStoppedError, match=rf"step {taken + stop + 1} is saved"):
            RUN[task](options(task, images, parts, resume="auto", workers=workers), progress=stop_at(stop))
        taken += stop + 1
        torch.rand(3)
        state = json.loads((parts / "checkpoints/state/progress.json").read_text())
        assert state["step"] == taken
    RUN[task](options(task, images, parts, resume=True, workers=workers))
    assert same_weights(whole, parts, *(["last", "best"] if task == "finetune" else ["last"]))
    assert rows(whole) == rows(parts)


def test_a_state_is_saved_when_it_is_due_and_when_asked(images: Path, tmp_path: Path) -> None:
    saved: list[tuple[int, Any]] = []
    original = write_state

    def spy(checkpoints: Path, files: Any, progress: Any, keep: int) -> None:
        saved.append((progress["step"], (progress.get("inside") or {}).get("batches")))
        original(checkpoints, files, progress, keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convnextv2.training.keeping.write_state", spy)
        pretrain(options("pretrain", images, tmp_path / "steps", epochs=1, save_steps=3, keep_states=3))
        assert saved == [(3, 3), (6, 6), (7, None)]
        states = state_folders(tmp_path / "steps" / "checkpoints")
        assert [path.name for path in states] == ["state", "state.1", "state.2"]
        assert [read_state(path)["step"] for path in states] == [7, 6, 3]
        saved.clear()
        pretrain(options("pretrain", images, tmp_path / "minutes", epochs=1, save_minutes=1e-9))
        assert [step for step, _ in saved] == [1, 2, 3, 4, 5, 6, 7, 7]
        saved.clear()
        lines: list[str] = []
        asked = stop_at(4, signal.SIGUSR1)
        pretrain(options("pretrain", images, tmp_path / "asked", epochs=1), progress=asked, log=lines.append)
        assert saved == [(5, 5), (7, None)]  # it went on


def state(folder: Path, step: int, keep: int = 2) -> None:
    files = {"model.safetensors": {"a": torch.ones(3)}, "optimizer.bin": {"state": {}}}
    write_state(folder, files, {"epoch": 1, "step": step, "config": {}}, keep)


def test_states_take_turns(tmp_path: Path) -> None:
    for step, names in enumerate((["state"], ["state", "state.1"], ["state", "state.1"]), 1):
        state(tmp_path, step)
        assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [read_state(path)["step"] for path in state_folders(tmp_path)] == [3, 2]
    state(tmp_path, 4, keep=1)
    assert [read_state(path)["step"] for path in state_folders(tmp_path)] == [4]
    # Killed between the renames: the newest is whole, but has not its name yet.
    state(tmp_path, 5)
    (tmp_path / "state").rename(tmp_path / "state.tmp")
    assert [read_state(path)["step"] for path in state_folders(tmp_path)] == [5, 4]
    take_up(tmp_path, "state.tmp")
    state(tmp_path, 6, keep=3)
    assert [(path.name, read_state(path)["step"]) for path in state_folders(tmp_path)] == [
        ("state", 6), ("state.1", 5), ("state.2", 4),
    ]  # fmt: skip
    (tmp_path / "state.1").rename(tmp_path / "state.7")  # a gap
    state(tmp_path, 7, keep=3)
    assert [read_state(path)["step"] for path in state_folders(tmp_path)] == [7, 6, 4]


def test_a_damaged_state_is_followed_by_the_one_before(images: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    pretrain(options("pretrain", images, whole))
    rng, run = random.Random(0), tmp_path / "run"
    with pytest.raises(RunStoppedError):
        pretrain(options("pretrain", images, run, save_steps=4), progress=stop_at(12))
    kept = {path: path.read_bytes() for path in sorted((run / "checkpoints" / "state").iterdir())}
    for _ in range(20):
        for path, content in kept.items():
            path.write_bytes(content)
        damaged = rng.choice(list(kept))
        damaged.write_bytes(kept[damaged][: rng.randrange(len(kept[damaged]))])
        found = newest_whole(run)
        assert found is not None
        assert (found["state"], found["step"]) == ("state.1", 12)
        assert damaged.name in found["damaged"]
    lines: list[str] = []
    pretrain(options("pretrain", images, run, resume=True), log=lines.append)
    assert any(line.startswith("warning: going back to the state before: ") for line in lines)
    assert "resuming after epoch 1, at step 12" in lines
    assert same_weights(whole, run, "last")
    assert rows(whole) == rows(run)


def test_what_cannot_be_written_is_told_and_changes_nothing(tmp_path: Path) -> None:
    state(tmp_path, 1)
    with pytest.raises(OSError, match="is the disk full"):
        write_state(tmp_path, {"model.safetensors": {"a": torch.ones(3)}, "no/folder.bin": {}}, {}, 2)
    assert [(path.name, read_state(path)["step"]) for path in state_folders(tmp_path)] == [("state", 1)]
    assert not (tmp_path / "state.tmp").exists()


def test_the_writer_tells_what_went_wrong_at_the_next_call() -> None:
    def fail() -> None:
        raise OSError("full")

    writer = Writer()
    done: list[int] = []
    writer.start(lambda: time.sleep(0.05) or done.append(1))
    writer.start(lambda: done.append(2))  # waits for the first
    writer.wait()
    assert done == [1, 2]
    writer.start(fail)
    with pytest.raises(OSError, match="full"):
        for _ in range(500):
            writer.check()
            time.sleep(0.01)
    writer.wait()
    writer.start(fail)
    writer.close()


@pytest.mark.parametrize(
    "values", [None, [], {}, {"batches": 1}, {**vars(SoFar()), "loss": float("nan")}, {**vars(SoFar()), "images": -1},
               {**vars(SoFar()), "batches": 1.5}, {**vars(SoFar()), "seconds": "1"}],
)  # fmt: skip
def test_what_an_epoch_had_come_to_is_checked(values: Any) -> None:
    assert not is_so_far(values)
    assert is_so_far({**vars(SoFar()), "loss": -2})


def test_none_of_the_states_is_whole(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    for step in (1, 2):
        state(tmp_path / "checkpoints", step)
    for folder in state_folders(tmp_path / "checkpoints"):
        (folder / "checksums.json").write_text('{"../../x": "0", "model.safetensors": 3}')
    with pytest.raises(CheckpointError, match=r"state/model\.safetensors: cannot be resumed from"):
        newest_whole(tmp_path)


def killed(images: Path, output: Path, *more: object) -> list[str]:
    own = "--mixup", "0.8", "--cutmix", "1", "--ema-decay", "0.9", "--batch-size", "2", "--epochs", "20"
    given = [*launching.TINY, *own, "--drop-path", "0.2", "--data", images, "--output", output, *more]
    return [str(launching.SCRIPTS / "finetune.py"), *map(str, given)]


@pytest.mark.slow
def test_a_run_killed_inside_of_epochs_ends_as_one_that_is_not(images: Path, tmp_path: Path) -> None:
    """Each attempt ends a random time after the state has changed, between two states or while one is written.

    Pre-training: tests/training/test_resume.py.
    """
    output, whole, rng = tmp_path / "run", tmp_path / "whole", random.Random(1)
    forked.run(*killed(images, whole), env=launching.ENVIRONMENT).check_returncode()
    arguments = killed(images, output, "--resume", "auto", "--save-steps", "2")
    progress, reached = output / "checkpoints" / "state" / "progress.json", 0
    for _ in range(4):
        process = forked.Forked(*arguments, env=launching.ENVIRONMENT)
        before, deadline = progress.stat().st_mtime_ns if progress.exists() else 0, time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if progress.exists() and progress.stat().st_mtime_ns != before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        done = process.finish(60)
        assert done.returncode == -signal.SIGKILL, done.stderr
        found = newest_whole(output)
        assert found is not None
        assert found["step"] >= reached
        reached = found["step"]
    forked.run(*arguments, env=launching.ENVIRONMENT).check_returncode()
    assert rows(output) == rows(whole)
    assert same_weights(whole, output, "last", "best")

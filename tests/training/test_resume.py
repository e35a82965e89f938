"""Runs that go on: where there is something to go on with, from a state that is whole, alone in their folder."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from train_helpers import finetune_options, make_images, pretrain_options, weights

from convnextv2.training import PretrainOptions, RunStoppedError, claim, finetune, pretrain
from convnextv2.training.recipe import parse_options
from convnextv2.training.states import find_state
from convnextv2.weights.checkpoint import CheckpointError

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "scripts" / "pretrain.py"
TINY = "--depths 1 1 1 1 --dims 8 8 16 16 --decoder-dim 16 --patch-size 8 --img-size 32 --batch-size 2 --workers 0"
LAUNCHER = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
THREE_EPOCHS = "--epochs", "3", "--reconstruct-every", "0"
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set")


@pytest.fixture(scope="module")
def half(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch."""
    output = tmp_path_factory.mktemp("half") / "run"
    pretrain(pretrain_options(images, output, epochs=1))
    return output


@pytest.fixture
def run(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "run"))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def epochs_of(output: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def command(images: Path, output: Path, *more: object) -> list[str]:
    given = [SCRIPT, "--data", images, "--output", output, *TINY.split(), "--backend", "reference", *more]
    return list(map(str, given))


BEGUN: dict[str, Callable[[Path, Path], None]] = {
    "no folder": lambda run, half: None,
    "an empty folder": lambda run, half: run.mkdir(),
    "half a recipe": lambda run, half: (run.mkdir(), (run / ".config.1a2b3c4d.tmp.yaml").write_text("da")),
    "a recipe": lambda run, half: (run.mkdir(), shutil.copy(half / "config.yaml", run)),
    "a recipe, and empty folders": lambda run, half: (
        (run / "checkpoints").mkdir(parents=True), (run / "reconstructions").mkdir(),
        shutil.copy(half / "config.yaml", run),
    ),
    "a row": lambda run, half: (
        (run / "checkpoints" / "state.tmp").mkdir(parents=True), shutil.copy(half / "config.yaml", run),
        (run / "metrics.jsonl").write_text('{"epoch": 1, "lo'),
    ),
    "weights": lambda run, half: (
        shutil.copytree(half, run), (run / "checkpoints/state").rename(run / "checkpoints/state.tmp")
    ),
}  # fmt: skip


@pytest.mark.parametrize("left", BEGUN)
def test_auto_starts_where_there_is_nothing_to_go_on_with(images: Path, half: Path, tmp_path: Path, left: str) -> None:
    output, lines = tmp_path / "run", []
    BEGUN[left](output, half)
    result = pretrain(pretrain_options(images, output, epochs=1, resume="auto"), log=lines.append)
    assert not [line for line in lines if "resuming" in line]
    assert epochs_of(output) == [1]
    assert all(torch.equal(value, weights(half)[name]) for name, value in weights(output).items())
    assert not list(output.glob(".*"))
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["last.safetensors", "state"]
    assert result.epochs == 1


def test_auto_goes_on_and_ends_where_all_is_done(images: Path, run: Path) -> None:
    lines: list[str] = []
    pretrain(pretrain_options(images, run, epochs=2, resume="auto"), log=lines.append)
    assert "resuming after epoch 1" in lines
    assert epochs_of(run) == [1, 2]
    before = digests(run)
    result = pretrain(pretrain_options(images, run, epochs=2, resume="auto"), log=lines.append)
    assert "nothing to do: 2 epochs are done" in lines
    assert result.epochs == 2
    after = digests(run)
    assert {name: after[name] for name in before if "config.yaml" not in name} == {
        name: value for name, value in before.items() if "config.yaml" not in name
    }


@pytest.mark.parametrize("what", ["a file of the user's", "weights without their state", "another project"])
def test_auto_refuses_a_folder_that_holds_other_things(images: Path, half: Path, tmp_path: Path, what: str) -> None:
    run = tmp_path / "run"
    if what == "weights without their state":
        shutil.copytree(half, run)
        shutil.rmtree(run / "checkpoints" / "state")
    else:
        run.mkdir()
        (run / ("notes.txt" if "user" in what else "config.yaml")).write_text("model: mine\nepochs: 3\n")
    before = digests(tmp_path)
    with pytest.raises(ValueError, match="holds other things than a run"):
        pretrain(pretrain_options(images, run, resume="auto"))
    assert digests(tmp_path) == before


def test_the_command_line_takes_resume_three_ways(run: Path, tmp_path: Path) -> None:
    def resume(*arguments: str) -> Any:
        return parse_options(PretrainOptions, ["--output", str(run), *arguments])

    assert resume().resume is False
    assert resume("--no-resume").resume is False
    assert resume("--resume").resume is True
    assert resume("--resume", "auto").resume == "auto"
    assert resume("--resume").dims == resume("--resume", "auto").dims == (8, 8, 16, 16)  # of the run
    assert resume("--resume", "--dims", "8", "8", "8", "8").dims == (8, 8, 8, 8)
    with pytest.raises(ValueError, match="auto"):
        resume("--resume", "perhaps")
    shutil.rmtree(run / "checkpoints")
    assert resume("--resume", "auto").dims is None  # starts anew: nothing of what was begun counts
    (run / "config.yaml").write_text("epochs: [3")
    with pytest.raises(ValueError, match="no valid YAML"):
        resume("--resume")


def test_what_a_kill_left_is_removed(images: Path, run: Path) -> None:
    (run / "reconstructions").mkdir(exist_ok=True)
    left = [
        run / "checkpoints" / ".best.1a2b3c4d.tmp.safetensors", run / ".metrics.00ff00ff.tmp.jsonl",
        run / "reconstructions" / ".epoch_0001.12345678.tmp.png",
    ]  # fmt: skip
    kept = [run / "checkpoints" / ".best.tmp.safetensors", run / "checkpoints" / "mine.safetensors"]
    for path in [*left, *kept]:
        path.write_bytes(b"half")
    for name in ("state.tmp", "state.old"):
        (run / "checkpoints" / name).mkdir()
    pretrain(pretrain_options(images, run, epochs=1, resume=True))
    assert not [path for path in left if path.exists()]
    assert [path for path in kept if path.exists()] == kept
    assert not [name for name in ("state.tmp", "state.old") if (run / "checkpoints" / name).exists()]


def progress(text: str) -> Callable[[Path], None]:
    return lambda run: (run / "checkpoints/state/progress.json").write_text(text) and None


def changed(**values: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / "checkpoints/state/progress.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def row(text: str) -> Callable[[Path], None]:
    def add(run: Path) -> None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(text + "\n")

    return add


def without(name: str) -> Callable[[Path], None]:
    return lambda run: (run / "checkpoints" / name).unlink()


def state_file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda run: (run / "checkpoints/state" / name).write_bytes(content) and None


def cut(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / "checkpoints/state" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])

    return change


class Malicious:
    """Makes a folder beside the run when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def malicious(name: str, bare: bool) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path, thing = run / "checkpoints/state" / name, Malicious(run.parent / "executed")
        path.write_bytes(pickle.dumps(thing)) if bare else torch.save({"x": thing}, path)

    return change


def optimizer(alter: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / "checkpoints/state/optimizer.bin"
        content = torch.load(path, weights_only=True)
        altered = alter(content)
        torch.save(content if altered is None else altered, path)

    return change


def moment(value: Any) -> Callable[[Path], None]:
    return optimizer(lambda content: content["state"][0].update(exp_avg=value))


def seal(run: Path) -> None:
    """Checksums as if what there is had been written so."""
    state = run / "checkpoints/state"
    files = [path for path in state.iterdir() if path.name != "checksums.json"]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (state / "checksums.json").write_text(json.dumps(sums))


STATE = "model.safetensors", "optimizer.bin"
DAMAGED: dict[str, Callable[[Path], None]] = {
    "no progress": without("state/progress.json"),
    "progress empty": progress(""),
    "progress {}": progress("{}"),
    "progress []": progress("[]"),
    "progress null": progress("null"),
    "progress nested": progress('{"epoch":' * 100_000 + "1" + "}" * 100_000),
    "progress of lists": progress("[" * 500 + "]" * 500),
    "progress of bytes": state_file("progress.json", b"\xff\xfe\x00"),
    "epoch in words": changed(epoch="one"),
    "epoch true": changed(epoch=True),
    "epoch zero": changed(epoch=0),
    "epoch large": changed(epoch=10**400),
    "step half": changed(step=1.5),
    "step nan": changed(step=float("nan")),
    "best a list": changed(best=[1]),
    "best in words": changed(best={"top1": "all"}),
    "config a list": changed(config=[]),
    "config nested": changed(config=json.loads('{"a":' * 400 + "1" + "}" * 400)),
    "row {}": row("{}"),
    "row []": row("[]"),
    "row of epoch text": row('{"epoch": "1"}'),
    "row nested": row("[" * 100_000 + "]" * 100_000),
    "no weights beside the state": without("last.safetensors"),
    **{f"no {name}": without(f"state/{name}") for name in STATE},
    **{f"{name} cut": cut(name) for name in STATE},
    **{f"{name} noise": state_file(name, bytes(range(256)) * 40) for name in ("optimizer.bin", "random_states_0.pkl")},
    **{
        f"{name} runs code, {bare}": malicious(name, bare)
        for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scaler.pt")
        for bare in (True, False)
    },
    "one file too many": lambda run: torch.save({}, run / "checkpoints/state/custom_checkpoint_0.pkl"),
    "optimizer empty": optimizer(lambda content: {}),
    "optimizer of lists": optimizer(lambda content: [1, 2]),
    "optimizer that holds itself": optimizer(lambda content: content["state"].update({0: content["state"]})),
    "moment of another network": moment(torch.zeros(3)),
    "moment expanded": moment(torch.ones(1).expand(10**6, 10**6)),
    "moment sparse": moment(torch.eye(3).to_sparse()),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_state_is_refused_in_a_line_before_anything_changes(
    images: Path, run: Path, tmp_path: Path, damage: str
) -> None:
    DAMAGED[damage](run)
    seal(run)  # the files themselves are looked at, too
    (run / "checkpoints" / "state.tmp").mkdir()
    before = digests(tmp_path)
    for resume in (True, "auto"):
        start = time.process_time()
        with pytest.raises(CheckpointError) as told:
            pretrain(pretrain_options(images, run, epochs=2, resume=resume))
        assert time.process_time() - start < 5
        assert str(run) in str(told.value)
        assert len(str(told.value)) < 500 + len(str(run))
    assert digests(tmp_path) == before
    assert (run / "checkpoints" / "state.tmp").is_dir()
    assert not (tmp_path / "executed").exists()


def test_an_average_that_runs_code_is_refused(images: Path, tmp_path: Path) -> None:
    options = finetune_options(images, tmp_path / "run", epochs=1, ema_decay=0.9)
    finetune(options)
    state = tmp_path / "run" / "checkpoints" / "state"
    finetune(replace(options, resume="auto", epochs=2))
    for bare in (True, False):
        for older in (tmp_path / "run" / "checkpoints").glob("state.*"):
            shutil.rmtree(older)
        malicious("custom_checkpoint_0.pkl", bare)(tmp_path / "run")
        seal(tmp_path / "run")
        with pytest.raises(CheckpointError, match=r"custom_checkpoint_0\.pkl: cannot be resumed from"):
            finetune(replace(options, resume=True, epochs=3))
        assert not (tmp_path / "executed").exists()
    # Names that are harmless where torch decides what they may do, not where the whole unpickler runs.
    (tmp_path / "other").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))

    class Loads:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.load, (str(tmp_path / "other"),)

    torch.save({"x": Loads()}, state / "custom_checkpoint_0.pkl")
    seal(tmp_path / "run")
    with pytest.raises(CheckpointError):
        finetune(replace(options, resume=True, epochs=3))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("lost", ["mean", "std", "best"])
def test_a_state_of_another_kind_of_run_is_refused(images: Path, tmp_path: Path, lost: str) -> None:
    options = finetune_options(images, tmp_path / "run", epochs=1)
    finetune(options)
    changed(**{lost: {} if lost == "best" else None})(tmp_path / "run")
    seal(tmp_path / "run")
    with pytest.raises(CheckpointError, match="of no fine-tuning"):
        finetune(replace(options, resume=True, epochs=2))


def test_metrics_taken_away_do_not_matter(images: Path, run: Path, script: Any) -> None:
    (run / "metrics.jsonl").unlink()
    result = script("pretrain", "--output", run, "--resume", "auto")
    assert (result.status, result.out) == (0, f"1 epochs are done: {run}/checkpoints/last.safetensors\n")


def test_a_state_that_is_saved_while_it_is_looked_for_is_found(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(pretrain_options(images, tmp_path / "run", epochs=1))
    answers = [None]
    monkeypatch.setattr(claim, "find_state", lambda run: answers.pop() if answers else find_state(run))
    found = claim.claim(tmp_path / "run", "auto", overwrite=False)
    assert found is not None and found["epoch"] == 1
    assert not answers


def test_one_run_at_a_time_is_in_a_folder(images: Path, tmp_path: Path) -> None:
    """A second one is told so, whatever it wants there, and the first goes on."""
    options = pretrain_options(images, tmp_path / "run", epochs=2)
    refused: list[str] = []

    def other(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
        for changes in ({"resume": "auto"}, {"overwrite": True}):
            with pytest.raises(ValueError, match="another run is at work there") as told:
                pretrain(replace(options, **changes))
            refused.append(str(told.value))
        if description.startswith("epoch 2/"):
            pid = os.fork()
            if pid == 0:  # as a worker that outlives the run
                signal.pause()
            workers.append(pid)
        yield from items

    workers: list[int] = []
    try:
        pretrain(options, progress=other)
        assert len(refused) == 4
        assert epochs_of(tmp_path / "run") == [1, 2]
        pretrain(replace(options, overwrite=True))
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_folder_that_changes_while_a_run_is_set_up_is_left_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = pretrain_options(images, tmp_path / "run", epochs=1)

    def late(self: Any, model: Any, resumed: bool) -> str:
        monkeypatch.undo()
        pretrain(options)
        return ""

    monkeypatch.setattr("convnextv2.training.pretraining.PretrainTask.initialise", late)
    with pytest.raises(ValueError, match="was changed by another run"):
        pretrain(replace(options, resume="auto", seed=1))
    assert "seed: 0\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert epochs_of(tmp_path / "run") == [1]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    images: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    output, whole = tmp_path / "run", tmp_path / "whole"
    epochs = "--epochs", "40", "--reconstruct-every", "0"
    forked.run(*command(images, whole, *epochs), env=ENVIRONMENT).check_returncode()
    arguments = command(images, output, *epochs, "--resume", "auto", "--save-steps", "2")

    def rows() -> int:
        path = output / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for attempt in range(7):
        process = forked.Forked(*arguments, env=ENVIRONMENT)
        goal, deadline = rows() + attempt % 3, time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and not (output.exists() and rows() >= goal):
            time.sleep(0.002)
        time.sleep(0.013 * (attempt * 5 % 7) + (0.5 if attempt % 3 == 0 and attempt else 0))
        process.send_signal(signum)
        done = process.finish(60)
        assert done.returncode in (-signum, 128 + signum), done.stderr
        assert "Traceback" not in done.stderr
    forked.run(*arguments, env=ENVIRONMENT).check_returncode()
    assert epochs_of(output) == list(range(1, 41))
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(output).items())


@pytest.fixture(scope="module")
def launched(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs in two processes."""
    output = tmp_path_factory.mktemp("launched") / "run"
    subprocess.run(
        [*LAUNCHER, *command(images, output, *THREE_EPOCHS)],
        env=ENVIRONMENT, check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    return output


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["0", "1"])
def test_a_launcher_restarts_a_run_of_which_one_process_is_killed(
    images: Path, launched: Path, tmp_path: Path, killed: str
) -> None:
    _, *arguments = command(images, tmp_path / "run", *THREE_EPOCHS, "--resume", "auto")
    marks = [tmp_path / "mark"]
    result = subprocess.run(
        [*LAUNCHER, "--max-restarts", "2", str(HERE / "killed_run.py"), killed, str(marks[0]), *arguments],
        env=ENVIRONMENT, check=False, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert marks[0].read_text() == "02"  # killed in the first epoch, and in the third
    assert epochs_of(tmp_path / "run") == [1, 2, 3]
    step = [
        json.loads((run / "checkpoints/state/progress.json").read_text())["step"]
        for run in (launched, tmp_path / "run")
    ]
    assert step == [9, 9]
    assert all(torch.equal(value, weights(launched)[name]) for name, value in weights(tmp_path / "run").items())


def test_a_stop_tells_how_to_go_on(images: Path, tmp_path: Path) -> None:
    def stop(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
        if description.startswith("epoch 2/"):
            signal.raise_signal(signal.SIGTERM)
        yield from items

    with pytest.raises(RunStoppedError, match="continue with `resume`"):
        pretrain(pretrain_options(images, tmp_path / "run"), progress=stop)

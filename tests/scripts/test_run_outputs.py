"""Where runs are written: no input and nothing of the user's is lost, and no run before the next one can start."""

from __future__ import annotations

import hashlib
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = "--depths 1 1 1 1 --dims 8 8 8 8 --patch-size 8 --img-size 32 --batch-size 4 --workers 0 --device cpu"
PRETRAIN = [*TINY.split(), "--decoder-dim", "8", "--backend", "reference", "--reconstruct-every", "0", "--epochs", "1"]


def digests(root: Path) -> dict[str, str]:
    """Files by their content, and links by where they lead."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = str(path.readlink())
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos/`` with two classes, and ``run/``, a pre-training on them."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("made")
    for name in "ab":
        (root / "photos" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / "photos" / name / f"{number}.png")
    command = [SCRIPTS / "pretrain.py", "--data", "photos", "--output", "run", *PRETRAIN]
    forked.run(*command, cwd=root).check_returncode()
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("photos", "run"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(place: Path, result: Any, before: dict[str, str]) -> str:
    *told, error = result.err.splitlines()
    assert result.status == 2, result
    assert error.startswith("error: ")
    assert not [line for line in told if not line.startswith("data: ")]
    assert digests(place) == before
    return error


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_outputs_that_are_refused(script: Any, place: Path, name: str) -> None:
    (place / "file").write_text("the work of a week")
    (place / "dangling").symlink_to("nowhere")
    (place / "inside").symlink_to("photos/a")
    (place / "mine").mkdir()
    (place / "mine" / "config.yaml").write_text("model: mine\nepochs: 3\n")
    (place / "mine" / "metrics.jsonl").write_text("mine\n")
    (place / "run" / "notes.txt").write_text("mine")
    before = digests(place)
    reasons = {
        "photos": "lies in the --data", "photos/a": "lies in the --data", "photos/new": "lies in the --data",
        "inside/new": "lies in the --data", "file": "is a file", "file/new": "is a file", "dangling": "leads nowhere",
        "/dev/null": "is a file", "mine": "holds no run of ours",
    }  # fmt: skip
    options = PRETRAIN if name == "pretrain" else TINY.split()
    for output, reason in reasons.items():
        for more in ([], ["--overwrite"], ["--resume", "auto"]):
            result = script(name, "--data", "photos", "--output", output, *options, *more)
            told = refused(place, result, before)
            assert reason in told or (output == "mine" and ("not empty" in told or "other things" in told)), told
    assert "not empty" in refused(place, script(name, "--data", "photos", "--output", "run", *options), before)


def test_a_folder_that_may_not_be_written_to(script: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "locked").mkdir()
    before = digests(place)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name not in ("locked", "run"))
    for output, more in (("locked", []), ("locked/a/b", []), ("run", ["--overwrite"]), ("run", ["--resume"])):
        result = script("pretrain", "--data", "photos", "--output", output, *PRETRAIN, *more)
        assert "may not write to" in refused(place, result, before)


OVERWRITE: dict[str, list[str]] = {
    "no data": ["--data", "nowhere"],
    "no images": ["--data", "run/checkpoints"],
    "no init": ["--init", "nowhere.pth"],
    "a damaged init": ["--init", "photos/a/0.png"],
    "an init of another network": ["--init", "run", "--dims", "16", "16", "16", "16", "--output", "copy"],
    "an init in the run": ["--init", "run"],
    "a file in the run as init": ["--init", "run/checkpoints/last.safetensors"],
    "no device": ["--device", "cuda:77"],
    "no optimizer": ["--optimizer", "adamx"],
    "no tracker": ["--tracker", "trackio"],
    "a size that does not fit": ["--img-size", "33"],
}


@pytest.mark.parametrize("wrong", OVERWRITE)
def test_a_run_is_deleted_once_the_new_one_can_start(script: Any, place: Path, wrong: str) -> None:
    shutil.copytree("run", "copy")
    before = digests(place)
    options = ["--data", "photos", "--output", "run", *PRETRAIN, "--overwrite", *OVERWRITE[wrong]]
    told = refused(place, script("pretrain", *options), before)
    if "run" in wrong:
        assert "read and then deleted" in told


@pytest.mark.filterwarnings("ignore:`log_with=wandb` was passed")
def test_a_tracker_that_does_not_start(script: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("not\nlogged in")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fails)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(__spec__=object()))
    before = digests(place)
    options = ["--data", "photos", "--output", "run", *PRETRAIN, "--overwrite", "--tracker", "wandb"]
    told = refused(place, script("pretrain", *options), before)
    assert "--tracker wandb cannot be started: not logged in" in told


def test_data_that_would_be_deleted(script: Any, place: Path) -> None:
    for name in ("reconstructions", "checkpoints/state/photos"):
        shutil.rmtree(place / "run" / name, ignore_errors=True)
        shutil.copytree("photos", place / "run" / name)
    shutil.copy("photos/a/0.png", "run/reconstructions/epoch_0001.png")
    before = digests(place)
    for data in ("run/reconstructions", "run/checkpoints/state/photos"):
        result = script("pretrain", "--data", data, "--output", "run", *PRETRAIN, "--overwrite")
        assert "read and then deleted" in refused(place, result, before)


def test_what_is_written(script: Any, place: Path) -> None:
    """What is no run's stays: beside the run, in its folders, and behind links."""
    shutil.copytree("photos", "parted/train")
    shutil.copytree("photos", "parted/val")
    mine = [Path("run/notes.txt"), Path("run/checkpoints/epoch_7.safetensors"), Path("run/reconstructions/best of.png")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    Path("elsewhere").mkdir()
    shutil.move("run/checkpoints", "elsewhere/checkpoints")
    Path("run/checkpoints").symlink_to(place / "elsewhere/checkpoints")
    Path("link").symlink_to("run")
    before = digests(place)
    outputs = {"link": "photos", "parted/runs/first": "parted", "new/run": "photos"}
    for output, data in outputs.items():
        more = ["--overwrite", "--init", "run"] if output != "link" else ["--overwrite"]
        result = script("pretrain", "--data", data, "--output", output, *PRETRAIN, *more)
        assert result.status == 0, result.err
        assert (Path(output) / "checkpoints" / "state" / "progress.json").is_file()
    after = digests(place)
    kept = {path: content for path, content in before.items() if "run/" not in path and "elsewhere" not in path}
    assert {path: after[path] for path in kept} == kept
    assert all(path.read_text() == "mine" for path in mine)
    assert Path("run/checkpoints").is_symlink()
    assert Path("link").is_symlink()


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [100, 20_000, 50_000])
@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
def test_a_full_disk_is_told_in_a_line(place: Path, size: int, how: str) -> None:
    """Whatever no longer fits: the recipe, the weights, or the state; there is something to go on with."""
    command = [SCRIPTS / "pretrain.py", "--data", "photos", "--output", "run", *PRETRAIN, "--epochs", 2]
    before = digests(place)
    full = forked.run(*command, how, cwd=place, before=partial(limit_files, size))
    assert full.returncode == 2, full.stderr
    assert "Traceback" not in full.stderr
    assert full.stderr.splitlines()[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in full.stderr.splitlines()) == 1
    if size == 100:
        assert digests(place) == before
    again = forked.run(*command, "--resume", "auto", cwd=place)
    assert again.returncode == 0, again.stderr
    assert ("resuming after epoch 1" in again.stderr) == (how == "--resume" or size == 100)
    assert not list((place / "run").rglob(".*"))


def demo(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run(SCRIPTS / "demo.py", *arguments, "--output", "demo", cwd=place)


@pytest.mark.parametrize(
    "name", ["samples/1/mine.png", "samples/notes.txt", "samples", "pretrain/notes.txt", "finetune/x/y"]
)
def test_the_demo_deletes_nothing_of_the_users(place: Path, name: str) -> None:
    """It is told before anything is trained."""
    (place / "demo" / name).parent.mkdir(parents=True)
    (place / "demo" / name).write_text("mine")
    before = digests(place)
    result = demo(place)
    assert result.returncode == 2, result
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stdout == ""
    assert digests(place) == before


def test_the_demo_is_not_written_into_the_data(place: Path) -> None:
    before = digests(place)
    (place / "demo").symlink_to("photos")
    result = demo(place, "--data", "photos")
    assert "lies in the --data" in result.stderr
    assert (result.returncode, result.stdout) == (2, "")
    (place / "demo").unlink()
    assert digests(place) == before


def test_the_samples_of_an_earlier_demo_are_used_again(place: Path) -> None:
    module = importlib.import_module("convnextv2.commands.demo")
    samples = module.digit_samples(place / "demo")
    before = digests(place)
    assert len(before) > 300
    assert module.digit_samples(place / "demo") == samples
    assert digests(place) == before
    assert [path.name for path in (place / "demo").iterdir()] == ["samples"]

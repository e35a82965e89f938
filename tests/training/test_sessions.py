"""``environment.json``: what each session of a run was started with and where."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from train_helpers import make_images, pretrain_options

from convnextv2 import create_fcmae, create_model
from convnextv2.training import environment, pretrain
from convnextv2.training.claim import own_files
from convnextv2.training.environment import NAME, backend_of, command, read_sessions, record_session


def test_each_start_adds_a_session_and_a_new_run_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, run = make_images(tmp_path / "images", count=2), tmp_path / "run"
    for epochs, changes in ((1, {}), (2, {"resume": True})):
        monkeypatch.setattr(sys, "argv", ["scripts/pretrain.py", "--epochs", str(epochs)])
        pretrain(pretrain_options(images, run, epochs=epochs, warmup_epochs=0, **changes))
        (*_, last) = sessions = read_sessions(run)
        assert (last["after_step"] > 0) == (epochs > 1)
        assert len(sessions) == epochs
        assert last["command"] == f"python scripts/pretrain.py --epochs {epochs}"
        assert (last["device"], last["processes"], last["precision"]) == ("cpu", 1, "no")
        assert last["backend"] == "reference"
        assert last["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
        assert {"convnextv2", "python", "timm", "accelerate"} <= last["versions"].keys()
        assert last["processor"]
        assert last["cores"] >= 1
    assert [one["started"] for one in sessions] == sorted(one["started"] for one in sessions)
    assert run / NAME in own_files(run)
    pretrain(pretrain_options(images, run, epochs=1, overwrite=True))
    assert len(read_sessions(run)) == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["a b.py", "--data", "it's"], "python 'a b.py' --data 'it'\"'\"'s'"),
        (["x", "--hub-token", "abc", "y"], "python x --hub-token '***' y"),
        (["x", "--api-key", "-abc", "--other", "y"], "python x --api-key '***' --other y"),
        (["x", "--password=abc", "--key", "k"], "python x '--password=***' --key '***'"),
        (["x", "WANDB_API_KEY=abc", "secret=1"], "python x 'WANDB_API_KEY=***' 'secret=***'"),
        (["x", "--data", "https://me:pw@host/a@b"], "python x --data 'https://***@host/a@b'"),
        (["x", "--keys", "1", "--monkey", "2"], "python x --keys 1 --monkey 2"),
        (["x", "caf\udce9"], "python x 'caf\\xe9'"),
        (["x", "--token", "--quick", "y"], "python x --token --quick y"),
    ],
)
def test_a_command_is_one_for_a_shell_without_secrets(argv: list[str], expected: str) -> None:
    assert command(argv) == expected
    assert len(shlex.split(command(argv))) == len(argv) + 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no list of sessions"),
        ("[" * 100_000, "no list of sessions"),
        ('{"sessions": [1]}', "no list of sessions"),
        ("[]", "no list of sessions"),
        ("{}" + " " * environment.MOST_BYTES, "larger than"),
    ],
)
def test_a_damaged_file_is_told_and_begun_anew(
    text: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_sessions(tmp_path)
    with caplog.at_level(logging.WARNING):
        record_session(tmp_path, Accelerator(cpu=True), torch.nn.Linear(1, 1), 0, False)
    assert reason in caplog.text
    (only,) = json.loads((tmp_path / NAME).read_text())["sessions"]
    assert only["backend"] == "torch"


def test_the_backend_is_the_one_that_runs() -> None:
    device, shape = torch.device("cpu"), {"img_size": 32, "patch_size": 16}
    assert (
        backend_of(create_fcmae("convnextv2_atto", **shape, backend="reference"), device, torch.float32) == "reference"
    )
    model = create_model("convnextv2_atto", backend="torch")
    assert backend_of(model, device, torch.float32) == model.runs_on


def test_the_commit_is_that_of_the_source_and_of_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package may lie in somebody's repository."""

    def refused(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    commit = environment.commit.__wrapped__
    there = (Path(environment.__file__).parents[2] / ".git").exists() and shutil.which("git") is not None
    found = commit()
    assert (found is not None) == there
    assert found is None or len(found.removesuffix("-dirty")) == 40
    monkeypatch.setattr(environment.subprocess, "run", refused)
    assert commit() is None
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    assert commit() is None

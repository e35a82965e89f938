import argparse
import errno
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convnextv2.data.sources import DataError
from convnextv2.weights.checkpoint import CheckpointError
from sparse_ops import BackendUnavailableError

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Any:
    import warnings

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    return importlib.import_module("convnextv2.commands._cli")


def status(cli: Any, main: Callable[[], int | None]) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "error: two lines"),
        (TypeError("t"), "error: t"),
        (DataError("d"), "error: d"),
        (CheckpointError("c"), "error: c"),
        (BackendUnavailableError("b"), "error: b"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a b"), "error: a b: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device"),
        (torch.OutOfMemoryError("big"), "error: big"),
        (ValueError(), "error: ValueError"),
    ],
)
def test_expected_errors_are_one_line(
    cli: Any, error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    assert status(cli, main) == 2
    assert capsys.readouterr() == ("", f"{line}\n")


def test_options_become_flags_in_every_line(cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of options alone: a `print` in a message is none."""
    import logging
    import warnings

    handlers, logging.root.handlers = logging.root.handlers, []

    def main() -> None:
        cli.say("`epochs` 3, `nothing`, ` epochs `")
        cli.warn("`batch_size`")
        sys.stderr.write(warnings.formatwarning(UserWarning("`warmup_epochs`"), UserWarning, "", 1))
        logging.getLogger("convnextv2.training").warning("%s", "`linear_probe`")
        logging.getLogger("convnextv2.training").info("not shown")
        raise ValueError("use `val_fraction`, `blr` 1 or `print`")

    try:
        assert status(cli, main) == 2
    finally:
        logging.root.handlers = handlers
    out, err = capsys.readouterr()
    assert out == "--epochs 3, `nothing`, ` epochs `\n"
    assert err.splitlines() == [
        "--batch-size",
        "warning: --warmup-epochs",
        "--linear-probe",
        "error: use --val-fraction, --blr 1 or `print`",
    ]


def test_traceback_on_request_and_for_defects(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise ValueError("x")

    monkeypatch.setenv("CONVNEXTV2_TRACEBACK", "1")
    with pytest.raises(ValueError, match="x"):
        cli.run(main)

    def defect() -> None:
        raise AssertionError

    with pytest.raises(AssertionError):
        cli.run(defect)


def test_interrupt_and_status(cli: Any) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert status(cli, interrupted) == 130
    assert status(cli, lambda: None) == 0
    assert status(cli, lambda: 3) == 3


def test_progress_is_plain_lines_when_piped(cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bar = cli.Progress([1, 2, 3], 3, "work", seconds=0)
    seen = []
    for item in bar:
        seen.append(item)
        bar.set_postfix_str(f"loss {item}", refresh=False)
    assert seen == [1, 2, 3]
    assert [line.split(" in ")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"work: {i}/3" for i in (1, 2, 3)
    ]
    list(cli.progress(iter("ab"), 2, "slow"))
    err = capsys.readouterr().err
    assert err.startswith("slow: 2/2")
    assert "\r" not in err


def test_progress_is_a_bar_on_a_terminal(
    cli: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(cli.progress([1, 2], description="work")) == [1, 2]
    assert "\rwork:" in capsys.readouterr().err


def test_types(cli: Any) -> None:
    assert cli.image_size("224") == (224, 224)
    assert cli.image_size("192x256") == (192, 256)
    for wrong in ("", "0", "-1", "axb", "1x2x3", "nan"):
        with pytest.raises(argparse.ArgumentTypeError):
            cli.image_size(wrong)
    assert cli.positive_int("3") == 3
    for wrong in ("0", "-3", "1.5", "x"):
        with pytest.raises(argparse.ArgumentTypeError):
            cli.positive_int(wrong)
    assert cli.device("cpu") == torch.device("cpu")
    for wrong in ("nonsense", "cuda:99"):
        with pytest.raises(argparse.ArgumentTypeError):
            cli.device(wrong)


def test_skipped_files_are_counted(cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cli.say_skipped([])
    assert capsys.readouterr().err == ""
    cli.say_skipped([(Path(f"x\n{i}"), "why") for i in range(8)], shown=2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["notice: skipped 8 unusable files:", "  x 0: why", "  x 1: why", "  … and 6 more"]


def test_a_script_of_its_own_process(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPTS / "predict.py", tmp_path / "日本.pth", tmp_path]
    env = {"PYTHONPATH": str(SCRIPTS.parent), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []

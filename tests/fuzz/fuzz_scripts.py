"""The scripts, run in this process, and what is asked of how they end."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import sys
from pathlib import Path
from typing import Any

from fuzz_harness import BrokenError, one_line

SCRIPTS = Path(__file__).parents[2] / "scripts"
NAMES = (
    "convert_sparse_to_dense",
    "demo",
    "embed",
    "evaluate",
    "finetune",
    "install_minkowski",
    "model_info",
    "predict",
    "pretrain",
    "summary",
    "visualize",
)


def load() -> dict[str, Any]:
    """The scripts' modules by name, and ``_cli``."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    logging.basicConfig(level=logging.ERROR)  # before the scripts do, for a stream that stays
    modules = {name: importlib.import_module(name) for name in NAMES}
    return modules | {"_cli": importlib.import_module("convnextv2.commands._cli")}


def run(main: Any, name: str, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a script as the command line would run it."""
    cli = load()["_cli"]
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = [f"{name}.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(main)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code, out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    raise BrokenError("the script returned")


def ended_well(status: int, err: str, *names: str) -> bool:
    """Whether a script did what it should; False where it ended with one line and status 2; else BrokenError."""
    if status == 0:
        if any(line.startswith(("error:", "Traceback")) for line in err.splitlines()):
            raise BrokenError(f"status 0 and {err!r}")
        return True
    said = [line for line in err.split("\n")[:-1] if not line.startswith(("usage:", " "))]
    if status != 2 or len(said) != 1 or not re.match(r"(\S+: )?error: ", said[0]):
        raise BrokenError(f"status {status} and {err[-2000:]!r}")
    one_line(said[0], *names)
    return False

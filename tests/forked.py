"""Programs in processes forked off one that has imported torch and its company, so that they start at once.

A program runs as by ``python FILE ARGUMENTS``, but for the end of the interpreter: handlers of ``atexit`` are not
called. Its pictures are blank. Results look like those of :mod:`subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blank_pictures import blank
from matplotlib.figure import Figure

PRELOADED = (
    "accelerate", "blank_pictures", "jsonargparse", "matplotlib.pyplot", "timm.data", "timm.optim", "timm.scheduler",
    "torchvision", "convnextv2.training.pretraining", "convnextv2.training.finetuning",
    "convnextv2.evaluation.prediction", "convnextv2.segmentation.training", "convnextv2.commands.demo",
    "sparse_ops.conformance_block",
    "sparse_ops.backends.cpu", "sparse_ops.backends.reference",
)  # fmt: skip
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([*PRELOADED])


class Forked:
    """A program at work.

    Args:
        file: the program.
        arguments: as words of its command line.
        cwd: folder to work in; this process's if left out.
        env: environment variables beside those of this process.
        before: called first, in the new process; must be picklable.
    """

    def __init__(
        self,
        file: object,
        *arguments: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        self.args = [str(file), *map(str, arguments)]
        self._said = tempfile.TemporaryDirectory()
        paths = [str(Path(self._said.name) / name) for name in ("out", "err")]
        place = str(cwd or Path.cwd())
        variables = {**os.environ, **(env or {})}
        self._process = _server.Process(target=_run, args=(self.args, place, variables, paths, before))
        self._process.start()
        self._paths = paths

    def poll(self) -> int | None:
        """The exit status, as :mod:`subprocess` counts it, or None."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self._process.pid is not None and self.poll() is None:
            os.kill(self._process.pid, number)

    def finish(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Wait for it, and what it said; killed, with TimeoutExpired, after ``timeout`` seconds."""
        self._process.join(timeout)
        if self.poll() is None:
            self._process.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self.args, timeout)
        out, err = (Path(path).read_text(encoding="utf-8") if Path(path).exists() else "" for path in self._paths)
        self._said.cleanup()
        status = self._process.exitcode
        assert status is not None
        return subprocess.CompletedProcess(self.args, status, out, err)


def run(file: object, *arguments: object, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; options as of :class:`Forked`."""
    return Forked(file, *arguments, **options).finish(timeout)


def _run(
    command: list[str], place: str, variables: dict[str, str], paths: list[str], before: Callable[[], object] | None
) -> None:
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(place)
    multiprocessing.set_start_method(None, force=True)  # the platform's own, as in any program
    Figure.savefig = blank  # type: ignore[method-assign]
    if before is not None:
        before()
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    runpy.run_path(command[0], run_name="__main__")

"""Runs of a script in several processes, as a launcher starts them, and what a run of tiny size is told."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked

SCRIPTS = Path(__file__).parents[2] / "scripts"
SIZES = "--depths 1 1 1 1 --dims 8 8 16 16 --patch-size 8 --img-size 32 --workers 0 --save-minutes 60"
TINY = tuple(SIZES.split())
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def processes(
    count: int, script: str, *arguments: object, before: Callable[[], object] | None = None
) -> list[forked.Forked]:
    """So many processes of one run, at work; they meet over gloo. Each calls ``before`` first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables = [{**shared, "RANK": rank, "LOCAL_RANK": rank} if count > 1 else {} for rank in range(count)]
    texts = [{name: str(value) for name, value in own.items()} for own in variables]
    file = SCRIPTS / f"{script}.py"
    return [forked.Forked(file, *map(str, arguments), env={**ENVIRONMENT, **own}, before=before) for own in texts]


def run(count: int, script: str, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """What so many processes of one run said that ended well."""
    done = [process.finish(240) for process in processes(count, script, *arguments)]
    for one in done:
        assert one.returncode == 0, one.stderr
    return done


def _second_process_at_its_third_batch(act: Callable[[], None]) -> None:
    from convnextv2.training.pretraining import PretrainTask

    original, batches = PretrainTask.loss, iter(range(1000))

    def loss(self: Any, model: Any, batch: Any) -> Any:
        if os.environ["RANK"] == "1" and next(batches) == 2:
            act()
        return original(self, model, batch)

    PretrainTask.loss = loss  # type: ignore[method-assign]


def hangs() -> None:
    """The second process of a pre-training does not answer any more."""
    _second_process_at_its_third_batch(lambda: time.sleep(1000))


def fails() -> None:
    """The second process of a pre-training ends with an error of its own."""

    def act() -> None:
        raise OSError(5, "the cable is out", "/data/b.png")

    _second_process_at_its_third_batch(act)

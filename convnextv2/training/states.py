"""States of a run on the disk: written by a thread from a copy, with checksums, the last few kept."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from convnextv2.files import write_json
from convnextv2.training.saved_state import CHECKSUMS, read_state
from convnextv2.training.sharding import full
from convnextv2.weights.checkpoint import CheckpointError
from convnextv2.weights.download import sha256

_STATE = re.compile(r"state(?:\.([1-9][0-9]*|old))?")


def state_folders(checkpoints: Path) -> list[Path]:
    """The states in a folder ``checkpoints``, the newest first, and whatever else has the name of one.

    A kill between the renames of :func:`write_state` leaves the newest, which is whole,
    under the name ``state.tmp``, and earlier versions left the last one as ``state.old``.
    """
    found = [(match[1], path) for path in checkpoints.glob("state*") if (match := _STATE.fullmatch(path.name))]
    ranks = {None: 0.0, "old": 0.5}
    folders = [path for _, path in sorted((ranks.get(n) or float(n or 0), path) for n, path in found)]
    new, first = checkpoints / "state.tmp", checkpoints / "state"
    return [new, *folders] if (new / CHECKSUMS).is_file() and not os.path.lexists(first) else folders


def find_state(run: Path) -> Path | None:
    """The folder of the last state of the run in a folder, if it has one."""
    return next((path for path in state_folders(run / "checkpoints") if path.is_dir()), None)


def newest_whole(run: Path) -> dict[str, Any] | None:
    """Progress of the newest state of a run that :func:`read_state` takes, with its name as ``state`` and, if others
    are newer, as ``damaged`` why they are not taken; None where the run has no state.

    Raises:
        CheckpointError: of the newest one, if none is whole.
    """
    refused = list[CheckpointError]()
    for folder in state_folders(run / "checkpoints"):
        try:
            found = {**read_state(folder), "state": folder.name}
        except CheckpointError as error:
            refused.append(error)
            continue
        return {**found, "damaged": str(refused[0]).partition("; start anew")[0]} if refused else found
    if refused:
        raise refused[0]
    return None


def copied(value: Any, keep: bool = True) -> Any:
    """Nested dictionaries and lists with their tensors, whole, copied to the processor's memory.

    Where there are shards, that is for all processes at once, of which some do not ``keep`` the tensors.
    """
    if isinstance(value, Tensor):
        whole = full(value.detach())
        return whole.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {key: copied(item, keep) for key, item in value.items()}
    return [copied(item, keep) for item in value] if isinstance(value, list) else value


class Writer:
    """Writes in a thread, one piece of work after another; what goes wrong is raised by the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "writer")
        self._last: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin ``work`` once what was begun before is done."""
        self.wait()
        self._last = self._pool.submit(work)

    def check(self) -> None:
        """Raise what went wrong; nothing is waited for."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Until what was begun is done; raises what went wrong."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Until what was begun is done, whatever comes of it."""
        self._pool.shutdown()


def remove(path: Path) -> None:
    """Remove what has this name, if anything has; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def mark(checkpoints: Path) -> None:
    """Say that weights and state are about to be written: without a state, what there is was begun and is of no use."""
    remove(checkpoints / "state.tmp")
    (checkpoints / "state.tmp").mkdir()


def write_state(checkpoints: Path, files: dict[str, Any], progress: dict[str, Any], keep: int) -> None:
    """Write a state, swapped in by rename: the old one or the new one is complete always.

    Args:
        checkpoints: the folder; its ``state`` becomes ``state.1`` and so on.
        files: names to contents, on the processor: of safetensors files dictionaries of tensors, of others what
            :func:`torch.save` takes.
        progress: JSON values.
        keep: how many states there are afterwards at most.

    Raises:
        OSError: if it cannot be written; the states that were there are kept.
    """
    new = checkpoints / "state.tmp"
    try:
        mark(checkpoints)
        for name, content in files.items():
            if name.endswith(".safetensors"):
                tensors = {part: tensor.contiguous() for part, tensor in content.items()}
                safetensors.torch.save_file(tensors, new / name, metadata={"format": "pt"})
            else:
                torch.save(content, new / name)
        write_json(new / "progress.json", progress)
        sums = {path.name: sha256(path) for path in sorted(new.iterdir())}
        write_json(new / CHECKSUMS, sums)
    except (OSError, SafetensorError, RuntimeError) as error:  # what these writers make of a full disk
        shutil.rmtree(new, ignore_errors=True)
        if not state_folders(checkpoints):
            new.mkdir(exist_ok=True)  # still a run that was begun, and has saved nothing
        raise OSError(f"cannot write {new} (is the disk full?); the state before is kept: {error}") from error
    before = [folder for folder in state_folders(checkpoints) if folder != new]
    for place, folder in reversed([*enumerate(before, 1)]):  # from the oldest on: each name is free when it is taken
        folder.rename(checkpoints / f"state.{place}")
    new.rename(checkpoints / "state")
    for place in range(keep, len(before) + 1):
        remove(checkpoints / f"state.{place}")


def take_up(checkpoints: Path, chosen: str) -> None:
    """Make the state called ``chosen`` the newest one; those that came after it are damaged, and removed."""
    folders = state_folders(checkpoints)
    place = [path.name for path in folders].index(chosen)
    kept = [path for path in folders[place:] if path.name == chosen or path.name != "state.old"]
    for folder in folders:
        if folder not in kept:
            remove(folder)
    for number, folder in enumerate(kept):
        folder.rename(checkpoints / (f"state.{number}" if number else "state"))

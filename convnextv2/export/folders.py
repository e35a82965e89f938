"""Folders as results: new ones, or in place of an earlier one of the same kind; never over anything else."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from convnextv2.outputs import OutputError, is_stream


def check_folder(path: Path, what: str, is_one: Callable[[Path], bool], inputs: Iterable[Path] = ()) -> None:
    """Refuse a place that a folder must not be written to.

    Args:
        path: of the folder.
        what: it is, in messages.
        is_one: whether a folder that exists is an earlier result.
        inputs: files and folders that are read; the folder holds none of them.

    Raises:
        OutputError: with the reason. Other folders are never replaced, for nobody knows what else lies in them.
        OSError: if the place cannot be looked at.
    """
    if is_stream(path):
        raise OutputError(f"{path}: {what} is a folder, which goes down no stream; name a folder")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file, and {what} is a folder; choose another name")
    target = path.resolve()
    for given in inputs:
        if given.exists() and given.resolve().is_relative_to(target):
            raise OutputError(f"{path}: the input {given} lies in it; choose another name for the result")
    if not path.exists():
        return
    if target == Path.cwd():
        raise OutputError(f"{path}: is the folder that you are in; name one in it")
    if any(path.iterdir()) and not is_one(path):
        raise OutputError(f"{path}: exists and is not {what} that was written here; choose another name")


def _settle(folder: Path) -> None:
    """Files as readable as others made here, which some writers leave to their owner alone, and on the disk."""
    probe = folder / "probe"
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.iterdir():
        file.chmod(usual)
        with file.open("rb") as written:
            os.fsync(written.fileno())


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        OSError: if it cannot be made or moved.
    """
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp") for _ in range(2))
    temporary.mkdir()
    try:
        yield temporary
        _settle(temporary)
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

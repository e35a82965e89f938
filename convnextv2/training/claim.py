"""What a folder is to a run that is to be written there: free, to be continued, to be replaced, or refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from convnextv2.data.digits import DIGITS
from convnextv2.files import is_leftover
from convnextv2.outputs import OutputError
from convnextv2.training.saved_state import read_rows
from convnextv2.training.states import find_state, newest_whole
from convnextv2.weights.checkpoint import CheckpointError, resolve_path

_WEIGHTS = ("checkpoints/best.safetensors", "checkpoints/last.safetensors")
_OURS = (
    *_WEIGHTS,
    *(f"checkpoints/{name}" for name in ("state", "state.tmp", "state.old", "state.[0-9]*")),
    "reconstructions/epoch_*.png",
    "metrics.jsonl",
    "loss.png",
    "neighbours.png",
    "class_indices.json",
    "confusion_matrix.png",
    *(f"{name}/events.out.tfevents.*" for name in ("pretrain", "finetune", "segment")),
    "environment.json",
    "diverged.json",
)


def own_files(run: Path) -> list[Path]:
    """What a new run takes the place of in a folder, beside config.yaml; all else stays."""
    return [path for pattern in _OURS for path in run.glob(pattern)]


def claim(
    run: Path,
    resume: bool | str,
    overwrite: bool,
    data: str | Path = "",
    init: str | Path | None = None,
    probe: str | Path = "",
) -> dict[str, Any] | None:
    """Progress of the run to be resumed in a folder, or None for a new one. Nothing is changed.

    Args:
        run: the folder.
        resume: True, False, or ``auto``: where there is something to resume. What a run left that was ended before it
            had saved a state is nothing.
        overwrite: let a new run take the place of one that is there.
        data, init, probe: what the new run reads; it is not to be written into, nor deleted.

    Raises:
        ValueError: if the folder is in use and neither flag is given, holds no run of ours, or an input, or lies in
            one; or if there is nothing to resume.
        CheckpointError: if what there is to resume is damaged.
        OSError: if it is no folder, or one that cannot be written to.
    """
    _check_place(run)
    state = find_state(run)
    if resume is True or (resume and state is not None):
        if state is None:
            raise ValueError(
                f"{run} holds no state to resume from: no run there, or none that had saved any; start one "
                "without `resume` (`overwrite` replaces what is there)"
            )
        read_rows(run / "metrics.jsonl")
        progress = newest_whole(run)
        assert progress is not None
        kept = run / _WEIGHTS["best" not in progress]
        if progress["epoch"] and not kept.is_file():
            raise CheckpointError(f"{kept}: is missing beside the state; start anew with `overwrite`")
        return progress
    read = [*_check_outside(run, data, "data"), *_check_outside(run, probe, "probe")]
    if run.is_dir() and any(not is_leftover(entry) for entry in run.iterdir()):
        if resume and not _was_begun(run):
            if find_state(run) is not None:  # saved since it was looked for, by a run that is at work
                return claim(run, resume, overwrite, data, init, probe)
            raise OutputError(
                f"{run} holds other things than a run that could be continued or was just begun; name another "
                "`output`, or replace a run that is there with `overwrite`"
            )
        if not resume and not overwrite:
            raise ValueError(
                f"{run} is not empty; continue that run with `resume`, replace it with `overwrite`, or name another "
                "`output`"
            )
        if not _is_run(run):
            raise OutputError(f"{run} holds no run of ours, which alone is overwritten; name another `output`")
    gone = [path.resolve() for path in own_files(run)]
    if gone and init is not None and os.path.lexists(init):
        read = [*read, resolve_path(init)]
    for given in read:
        real = given.resolve()
        if any(real.is_relative_to(path) or path.is_relative_to(real) for path in gone):
            raise OutputError(f"{given}: would be read and then deleted by the run; name another `output`")
    return None


def _check_place(run: Path) -> None:
    here = next(path for path in (run, *run.absolute().parents) if os.path.lexists(path))
    if not here.is_dir():
        what = "is a file" if here.exists() else "is a link that leads nowhere"
        raise NotADirectoryError(errno.ENOTDIR, f"{what}, expected a folder for the run", str(here))
    if not os.access(here, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "is a folder that you may not write to; name another `output`", str(here))


def _check_outside(run: Path, data: str | Path, option: str) -> list[Path]:
    """The folders that images are read from, none of which a run is to be written into."""
    folder = Path(data)
    parts = [folder / name for name in ("train", "val")]
    read = [] if str(data) in ("", DIGITS) else parts if all(part.is_dir() for part in parts) else [folder]
    for given in read:
        # Who works inside of the data, as with `data` ".", has chosen so.
        works_there = Path.cwd().is_relative_to(given.resolve())
        if run.resolve() == given.resolve() or (run.resolve().is_relative_to(given.resolve()) and not works_there):
            raise OutputError(
                f"{run} lies in the `{option}` {given}, and pictures of the run would be read as images; name another "
                "`output`"
            )
    return read


def _is_run(run: Path) -> bool:
    """Whether there is a run of ours: its checkpoints, or its recipe."""
    if find_state(run) is not None or any((run / name).is_file() for name in _WEIGHTS):
        return True
    if not (run / "config.yaml").is_file():
        return False
    with (run / "config.yaml").open(encoding="utf-8", errors="replace") as file:
        text = file.read(2**16)
    return all(f"\n{name}: " in text for name in ("output", "epochs", "warmup_epochs"))


def _was_begun(run: Path) -> bool:
    """Whether a run of ours was ended before it had saved a state: what it left is of no use."""
    saving = (run / "checkpoints" / "state.tmp").is_dir()
    return _is_run(run) and (saving or not any((run / name).exists() for name in _WEIGHTS))

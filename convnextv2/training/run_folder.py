"""The folder of a run: checkpoints, state to resume from, metrics, recipe and pictures."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from convnextv2.files import append_jsonl, atomic_path, write_json
from convnextv2.models.config import config_to_dict
from convnextv2.training.device import Accelerator
from convnextv2.weights.checkpoint import CheckpointError

logger = logging.getLogger(__name__)


class RunFolder:
    """Files of a run in ``path``, of which nothing is touched before :meth:`prepare`."""

    OURS = (
        "checkpoints",
        "reconstructions",
        "metrics.jsonl",
        "loss.png",
        "config.yaml",
        "class_indices.json",
        "confusion_matrix.png",
    )

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics_path = self.path / "metrics.jsonl"
        self.state = self.path / "checkpoints" / "state"
        self._new, self._old = self.state.with_name("state.tmp"), self.state.with_name("state.old")

    def checkpoint(self, name: str) -> Path:
        """Path of the weights called ``last`` or ``best``."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def check(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Progress of the run to be resumed, or None for a new one.

        Raises:
            ValueError: if the folder is in use and neither flag is given, or there is nothing to resume.
            CheckpointError: if what there is to resume is damaged.
            NotADirectoryError: if it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is a file, expected a folder for the run", str(self.path))
        if not resume:
            if self.path.is_dir() and not overwrite and any(self.path.iterdir()):
                raise ValueError(
                    f"{self.path} is not empty; continue that run with --resume, replace it with --overwrite, or name "
                    "another --output"
                )
            return None
        # A kill between the two renames of save_state leaves the last complete state under its other name.
        folder = next((f for f in (self.state, self._old) if (f / "progress.json").is_file()), None)
        if folder is None:
            raise ValueError(
                f"{self.path} holds no state to resume from: no run there, or none that finished an epoch; start one "
                "without --resume (--overwrite replaces what is there)"
            )
        try:
            return json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(
                f"{folder / 'progress.json'} is damaged ({error}); start anew with --overwrite"
            ) from error

    def prepare(self, progress: dict[str, Any] | None) -> None:
        """Make the folder, empty of an earlier run, or bring the run to be resumed back to its last saved epoch."""
        if progress is None:
            for target in map(self.path.joinpath, self.OURS):
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
            self.state.parent.mkdir(parents=True)
            return
        if not self.state.exists():
            self._old.rename(self.state)
        for leftover in (self._old, self._new):
            shutil.rmtree(leftover, ignore_errors=True)
        if rows := [row for row in self.metrics() if row["epoch"] <= progress["epoch"]]:
            with atomic_path(self.metrics_path) as temporary:
                for row in rows:
                    append_jsonl(temporary, row)

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl``; a line cut off by a kill is left out."""
        if not self.metrics_path.is_file():
            return []
        rows = [_row(line) for line in self.metrics_path.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if row is not None]

    def save_state(self, accelerator: Accelerator, progress: dict[str, Any]) -> None:
        """Save everything a resumed run needs, swapped in by rename: the old state or the new one is complete always.

        Raises OSError if it cannot be written.
        """
        if accelerator.is_main_process and self._new.exists():
            shutil.rmtree(self._new)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(self._new))
        except (SafetensorError, RuntimeError) as error:  # what these writers make of a full disk
            shutil.rmtree(self._new, ignore_errors=True)
            raise OSError(f"cannot write {self._new} (is the disk full?): {error}") from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(self._new / "progress.json", progress)
            if self.state.exists():
                shutil.rmtree(self._old, ignore_errors=True)
                self.state.rename(self._old)
            self._new.rename(self.state)
            shutil.rmtree(self._old, ignore_errors=True)
        accelerator.wait_for_everyone()

    def load_state(self, accelerator: Accelerator) -> None:
        """Load what :meth:`save_state` wrote; CheckpointError if it is damaged or does not fit."""
        try:
            accelerator.load_state(str(self.state))
        except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{self.state}: cannot be resumed from ({reason}); start anew with --overwrite"
            ) from error


def _row(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        logger.warning("left out a damaged line of the metrics: %s", line[:80])
        return None


def check_same_model(progress: dict[str, Any], config: Any, output: str | Path) -> None:
    """Raise ValueError unless the run to be resumed trains a network of this configuration."""

    def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    before, now = dict(flat(progress["config"])), dict(flat(json.loads(json.dumps(config_to_dict(config)))))
    different = [
        f"{k} {before.get(k)} there, {now.get(k)} here" for k in {**before, **now} if before.get(k) != now.get(k)
    ]
    if different:
        raise ValueError(
            f"{output} holds a run of another network ({'; '.join(different)}); resume with its options, or use "
            "--init to take its weights only"
        )

"""The folder of a run: checkpoints, state to resume from, metrics, recipe and pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from convnextv2.files import append_jsonl, atomic_path, is_leftover, write_json
from convnextv2.models.config import config_to_dict
from convnextv2.training.claim import own_files
from convnextv2.training.device import Accelerator
from convnextv2.training.saved_state import read_rows


class RunFolder:
    """Files of a run in ``path``, of which nothing is touched before :meth:`prepare`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe, self.metrics_path = self.path / "config.yaml", self.path / "metrics.jsonl"
        folder = self.path / "checkpoints"
        self.state, self._new, self._old = folder / "state", folder / "state.tmp", folder / "state.old"

    def checkpoint(self, name: str) -> Path:
        """Path of the weights called ``last`` or ``best``."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def prepare(self, progress: dict[str, Any] | None, recipe: str) -> None:
        """Make the folder, empty of an earlier run, or bring the run to be resumed back to its last saved epoch.

        The recipe is on the disk before anything is deleted.
        """
        for folder in (self.path, self.state.parent, self.path / "reconstructions"):
            for leftover in [path for path in folder.glob("*") if is_leftover(path)]:
                leftover.unlink()
        with atomic_path(self.recipe) as temporary:
            temporary.write_text(recipe, encoding="utf-8")
            for path in own_files(self.path) if progress is None else ():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.state.parent.mkdir(parents=True, exist_ok=True)
        if progress is None:
            return
        if not self.state.exists():
            self._old.rename(self.state)
        for folder in (self._old, self._new):
            shutil.rmtree(folder, ignore_errors=True)
        if rows := [row for row in self.metrics() if row["epoch"] <= progress["epoch"]]:
            with atomic_path(self.metrics_path) as temporary:
                for row in rows:
                    append_jsonl(temporary, row)

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl``, as :func:`~convnextv2.training.saved_state.read_rows` gives and refuses them."""
        return read_rows(self.metrics_path)

    def begin_saving(self) -> None:
        """Mark that weights and state are about to be written, in the first process."""
        shutil.rmtree(self._new, ignore_errors=True)
        self._new.mkdir()

    def save_state(self, accelerator: Accelerator, progress: dict[str, Any]) -> None:
        """Save everything a resumed run needs, swapped in by rename: the old state or the new one is complete always.

        Raises OSError if it cannot be written.
        """
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(self._new))
        except (OSError, SafetensorError, RuntimeError) as error:  # what these writers make of a full disk
            shutil.rmtree(self._new, ignore_errors=True)
            if not self.state.exists():
                self._new.mkdir(exist_ok=True)  # still a run that was begun, and has saved nothing
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
            "`init` to take its weights only"
        )

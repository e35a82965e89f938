"""The folder of a run: checkpoints, state to resume from, metrics, recipe and pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convnextv2.files import append_jsonl, atomic_path, is_leftover
from convnextv2.models.config import config_to_dict
from convnextv2.training.claim import own_files
from convnextv2.training.saved_state import read_rows
from convnextv2.training.states import remove, take_up


class RunFolder:
    """Files of a run in ``path``, of which nothing is touched before :meth:`prepare`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe, self.metrics_path = self.path / "config.yaml", self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self._new = self.checkpoints / "state.tmp"

    def checkpoint(self, name: str) -> Path:
        """Path of the weights called ``last`` or ``best``."""
        return self.checkpoints / f"{name}.safetensors"

    def prepare(self, progress: dict[str, Any] | None, recipe: str) -> None:
        """Make the folder, empty of an earlier run, or bring the run to be resumed back to its last whole state.

        The recipe is on the disk before anything is deleted.
        """
        for folder in (self.path, self.checkpoints, self.path / "reconstructions"):
            for leftover in [path for path in folder.glob("*") if is_leftover(path)]:
                leftover.unlink()
        with atomic_path(self.recipe) as temporary:
            temporary.write_text(recipe, encoding="utf-8")
            for path in own_files(self.path) if progress is None else ():
                remove(path)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if progress is None:
            return
        take_up(self.checkpoints, progress["state"])
        shutil.rmtree(self._new, ignore_errors=True)
        rows = [row for row in self.metrics() if row["epoch"] <= progress["epoch"]]
        with atomic_path(self.metrics_path) as temporary:
            for row in rows:
                append_jsonl(temporary, row)

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl``, as :func:`~convnextv2.training.saved_state.read_rows` gives and refuses them."""
        return read_rows(self.metrics_path)


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

"""Run folders as runs leave them, without a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from convnextv2.files import write_json
from convnextv2.training import FinetuneOptions, PretrainOptions
from convnextv2.training.environment import NAME
from convnextv2.training.pictures import save_confusion_matrix, save_reconstructions
from convnextv2.training.recipe import recipe_text

HOSTILE = "<img src=x onerror=alert(1)>\"'&{{7*7}}</script><script>alert(2)</script>"
SESSION = {
    "started": "2026-01-02T03:04:05+00:00",
    "command": "python scripts/pretrain.py --data photos --output 'my runs/a'",
    "commit": "0" * 40,
    "versions": {"torch": "2.11.0", "python": "3.11.7"},
    "device": "cpu",
    "processes": 1,
}


def pretraining(folder: Path, epochs: int = 4, drawn: tuple[int, ...] = (2, 4), **changes: Any) -> Path:
    """A pre-training that has ended, with reconstructions after the epochs ``drawn``."""
    rows = [
        {"epoch": epoch, "step": 9 * epoch, "loss": 1 / epoch, "lr": 1e-3 / epoch, "seconds": 2.0 + epoch,
         "images_per_s": 90.5, "data_wait": 0.01 * epoch, "feature_diversity": 0.5 - 0.01 * epoch}
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip
    options = PretrainOptions(data="photos", output=str(folder), epochs=epochs, **changes)
    written(folder, recipe_text(options), rows, SESSION)
    panels = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for epoch in drawn:
        save_reconstructions(folder / "reconstructions" / f"epoch_{epoch:04d}.png", panels, torch.ones(2, 4))
    return folder


def finetuning(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), epochs: int = 5, **changes: Any) -> Path:
    """A fine-tuning that has ended."""
    rows = [
        {"epoch": epoch, "step": 9 * epoch, "train_loss": 2 / epoch, "val_loss": 1.5 / epoch, "lr": 1e-3,
         "val_top1": 50 + 10 * math.sin(epoch), "seconds": 60.0, "images_per_s": 80 + epoch, "data_wait": 0.0}
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip
    options = FinetuneOptions(data="photos", output=str(folder), epochs=epochs, **changes)
    written(folder, recipe_text(options), rows, SESSION)
    write_json(folder / "class_indices.json", {str(place): name for place, name in enumerate(classes)})
    save_confusion_matrix(folder / "confusion_matrix.png", np.eye(len(classes), dtype=int), classes)
    return folder


def written(folder: Path, recipe: str, rows: list[dict[str, Any]], *sessions: dict[str, Any]) -> Path:
    """The files that tell of a run."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.safetensors").write_bytes(b"0" * 2_500_000)
    (folder / "config.yaml").write_text(recipe, encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    write_json(folder / NAME, {"sessions": list(sessions)})
    return folder


def noise(path: Path, width: int, height: int) -> Path:
    """A picture that is hard to make small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    return path

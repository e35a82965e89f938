"""A study of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from studies.declaration import Study, read_study

TINY: dict[str, Any] = {
    "data": "digits",
    "labels": [1, 0.2],
    "measures": ["knn", "finetune"],
    "options": {
        "depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8], "img_size": 16, "patch_size": 8, "in_chans": 1,
        "batch_size": 32, "workers": 0, "backend": "auto",
    },
    "pretrain": {"epochs": 2, "decoder_dim": 8, "mask_ratio": 0.5, "warmup_epochs": 0},
    "finetune": {"epochs": 2, "warmup_epochs": 0, "blr": 0.05, "head_init_scale": 1.0},
    "probes": 1,
    "questions": {"labels": {"title": "By labels", "arms": {"FCMAE": {}, "scratch": {"pretrain": None}}}},
    "scales": {"smoke": {"images": 60}},
}  # fmt: skip


def write_study(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False), encoding="utf-8")
    return path


def tiny_study(folder: Path, **changes: Any) -> Study:
    return read_study(str(write_study(folder, **changes)), "smoke")

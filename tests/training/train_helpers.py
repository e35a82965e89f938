"""Tiny runs on images made on the fly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from convnextv2.training.finetuning import FinetuneOptions
from convnextv2.training.pretraining import PretrainOptions

SMALL: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "dims": (8, 8, 16, 16),
    "img_size": (32, 32),
    "patch_size": 8,
    "workers": 0,
    "batch_size": 4,
    "device": "cpu",
}


def make_images(folder: Path, classes: tuple[str, ...] = ("red", "green", "blue"), count: int = 5) -> Path:
    """``count`` noisy images a class, told apart by their colour; returns ``folder``."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 80, (40, 48, 3))
            pixels[..., number % 3] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def pretrain_options(data: Path | str, output: Path, **changes: Any) -> PretrainOptions:
    values = {**SMALL, "decoder_dim": 16, "epochs": 2, "reconstruct_every": 0, "backend": "reference", "probe": "none"}
    return PretrainOptions(data=str(data), output=str(output), **{**values, **changes})


def finetune_options(data: Path | str, output: Path, **changes: Any) -> FinetuneOptions:
    return FinetuneOptions(data=str(data), output=str(output), **{**SMALL, "in_chans": 3, "epochs": 2, **changes})


def compile_without_inductor(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """torch.compile traces as ever but generates no code, which would take minutes; returns the modes asked for."""
    modes: list[str | None] = []
    original = torch.compile

    def traced(function: Any, *, mode: str | None = None, fullgraph: bool = False) -> Any:
        modes.append(mode)
        return original(function, fullgraph=fullgraph, backend="aot_eager")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", traced)
    return modes


def weights(output: Path, name: str = "last") -> dict[str, Any]:
    return load_file(output / "checkpoints" / f"{name}.safetensors")

"""Images of discs and squares on textured ground, with their masks: 0 the ground, 1 discs, 2 squares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convnextv2.segmentation import SegmentOptions

SMALL: dict[str, Any] = {
    "depths": (1, 1, 1, 1),
    "dims": (8, 8, 16, 16),
    "decoder_width": 64,
    "img_size": (32, 32),
    "patch_size": 8,
    "workers": 0,
    "batch_size": 4,
    "device": "cpu",
    "tracker": "none",
    "epochs": 2,
}


def drawn(rng: np.random.Generator, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels ``[H, W, 3]`` and classes ``[H, W]``."""
    rows, columns = np.mgrid[:height, :width]
    pixels = rng.normal(100, 25, (height, width, 3))
    mask = np.zeros((height, width), np.uint8)
    for number in range(4):
        y, x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(5, 10)
        square = number % 2
        inside = (np.maximum if square else np.hypot)(abs(rows - y), abs(columns - x)) < radius
        mask[inside] = 1 + square
        pixels[inside] += [-60, -60, 80] if square else [90, 40, -40]
    return pixels.clip(0, 255).astype(np.uint8), mask


def make_pairs(root: Path, count: int = 6, size: tuple[int, int] = (40, 48), seed: int = 0) -> Path:
    """``count`` pairs below ``root``, which is returned."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number in range(count):
        pixels, mask = drawn(rng, *size)
        Image.fromarray(pixels).save(root / "images" / f"{number:03d}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number:03d}.png")
    return root


def make_parts(root: Path, counts: Sequence[int] = (8, 3), **options: Any) -> Path:
    """``train`` and ``val`` with so many pairs each."""
    for seed, (name, count) in enumerate(zip(("train", "val"), counts, strict=True)):
        make_pairs(root / name, count, seed=seed, **options)
    return root


def segment_options(data: Path | str, output: Path, **changes: Any) -> SegmentOptions:
    return SegmentOptions(data=data, output=output, **{**SMALL, **changes})

"""Where images come from: decoded images by number, and how they are parted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convnextv2.data.images import load_image


class DataError(ValueError):
    """No usable data; the message says what was looked for, where, and what was found."""


def stratified_split(labels: Sequence[int], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of a training and a validation part, both sorted; every class is split in the same proportion.

    A class of two or more images has at least one in each part; a single image is for training.

    Raises:
        ValueError: unless ``val_fraction`` lies strictly between 0 and 1.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie strictly between 0 and 1, got {val_fraction}")
    rng = np.random.default_rng(seed)
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    train: list[int] = []
    val: list[int] = []
    for label in sorted(members):
        order = [members[label][i] for i in rng.permutation(len(members[label]))]
        count = min(len(order) - 1, max(1, round(len(order) * val_fraction)))
        val += order[:count]
        train += order[count:]
    return sorted(train), sorted(val)


class Source(Protocol):
    """Decoded images by number."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image | NDArray[np.float32]:
        """An RGB image, or an array ``[H, W, C]`` where C is neither 1 nor 3.

        Raises:
            UnreadableImageError: if it cannot be decoded.
        """


@dataclass(frozen=True)
class FileSource:
    """Images in files."""

    paths: Sequence[Path]
    in_chans: int

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Image.Image | NDArray[np.float32]:
        return load_image(self.paths[index], self.in_chans)

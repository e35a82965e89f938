"""Random changes of training images: what can be asked for, and the choices that have names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel."""
USUAL_SPAN = 4.0
"""Standard deviations that most values of a band lie within: the unit of ``brightness``."""


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images. None leaves the choice to the task and the data set.

    Args:
        crop_scale: smallest and largest share of the image's area that a random crop takes.
        hflip: probability of a horizontal flip.
        color_jitter: strength of the colour jitter; ignored with ``auto_augment``, as timm does.
        auto_augment: timm's policy string, such as ``rand-m9-mstd0.5-inc1``; None for none.
        random_erasing: probability that a rectangle is replaced by noise.
    """

    crop_scale: tuple[float, float] | None = None
    hflip: float | None = None
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        if self.crop_scale is not None:
            scale = tuple(self.crop_scale)
            object.__setattr__(self, "crop_scale", scale)
            if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
                raise ValueError(f"crop_scale must be two numbers, 0 < smallest ≤ largest ≤ 1, got {scale}")
        for name in ("hflip", "random_erasing"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be a probability in [0, 1], got {value}")
        if not self.color_jitter >= 0:
            raise ValueError(f"color_jitter must not be negative, got {self.color_jitter}")
        if self.auto_augment is not None:
            _check_policy(self.auto_augment)


def _check_policy(policy: str) -> None:
    from timm.data import create_transform

    try:
        create_transform(32, is_training=True, auto_augment=policy)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"`auto_augment`: timm knows no policy {policy!r}; one is rand-m9-mstd0.5-inc1") from error


@dataclass(frozen=True)
class BandAugmentation(Augmentation):
    """Random changes of training images in their own units; one that is None is as the data set's kind has it.

    Args:
        still: no change at all: the middle of each image.
        vflip: probability of a flip upside down.
        turns: whether images are turned by a random multiple of 90°.
        brightness: largest shift of a band, in :data:`USUAL_SPAN` standard deviations; drawn for each band.
        contrast: largest relative change of the distance from a band's mean; drawn for each band.
        noise: largest standard deviation of added noise, in standard deviations of the band.
        band_dropout: probability that a band is replaced by its mean; one band at least is kept.
    """

    still: bool = False
    vflip: float = 0.0
    turns: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0
    band_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vflip", "band_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be a probability in [0, 1], got {getattr(self, name)}")
        for name in ("brightness", "contrast", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a finite number, not negative, got {getattr(self, name)}")


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "photo": {"crop": "area"},
    "microscopy": {
        "crop": "native", "vflip": 0.5, "turns": True, "brightness": 0.1, "contrast": 0.2, "noise": 0.1,
    },
    "satellite": {
        "crop": "native", "vflip": 0.5, "turns": True, "brightness": 0.05, "contrast": 0.1, "band_dropout": 0.1,
    },
    "none": {"crop": "area", "still": True},
}  # fmt: skip
"""Choices of ``augment``; ``crop`` is a wish of :class:`~.decoding.Wanted`, the others of :class:`BandAugmentation`."""

"""Options of a training for segmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from convnextv2.segmentation.config import DECODERS
from convnextv2.training.recipe import option
from convnextv2.training.task_options import TuningOptions

OF_IMAGES_ALONE = (
    *("reduce_jpeg", "cache", "cache_side", "resize", "augment_on", "views"),
    *("augment", "crop", "turns", "brightness", "contrast", "noise", "band_dropout", "window"),
)
"""Options of every run that would change images, and not their masks."""


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(TuningOptions):
    """Options of a run of segmentation."""

    task: ClassVar[str] = "segment"
    epochs: int = option(50, "passes over the data")
    batch_size: int = option(16, "crops a step and process; no more than there are images is taken")
    img_size: tuple[int, int] | None = option(
        None, "pixels of crops, and of the windows of validation: 224, or HEIGHTxWIDTH; default: as --init, else 224"
    )
    blr: float = option(
        3e-3, "base learning rate: the peak is blr * batch / 256, with accumulation and processes counted in the batch"
    )
    classes: str = option(
        "", "names of the classes 0, 1, … by commas; default: those of DATA/classes.json, else the values of the masks"
    )
    ignore_index: int = option(255, "value in masks of pixels that are of no class; -1: there are none")
    val_fraction: float = option(0.2, "share of the pairs to validate on, where DATA has no train/ and val/ folders")
    decoder: str = option("upernet", "of segmentation-models-pytorch", DECODERS)
    decoder_width: int = option(256, "channels of the decoder, a multiple of 64")
    dice: float = option(0.0, "weight of the Dice loss beside cross entropy")
    scale: tuple[float, float] = option(
        (0.5, 2.0), "least and largest factor that an image is resized by before it is cropped"
    )
    hflip: float = option(0.5, "probability of a horizontal flip")
    vflip: float | None = option(0.0, "probability of a vertical flip, for images without an up and down")

    def check(self) -> None:
        from convnextv2.data.digits import DIGITS  # with torch: not for --help

        if self.data == DIGITS:
            raise ValueError("`data` digits has no masks; name a folder with images/ and masks/")
        for item in fields(self):
            if item.name in OF_IMAGES_ALONE and getattr(self, item.name) != item.default:
                raise ValueError(f"`{item.name}` would change images and not their masks; leave it out")
        super().check()
        self.require("must be at least 0 and below inf", lambda value: 0 <= value < math.inf, "dice")
        self.require("must be a probability in [0, 1]", lambda value: 0 <= value <= 1, "hflip", "vflip")
        self.require("must be in [-1, 65535]", lambda value: -1 <= value < 2**16, "ignore_index")
        self.require(f"must be one of {', '.join(DECODERS)}", DECODERS.__contains__, "decoder")
        rule = "must be two factors, 0.01 ≤ least ≤ largest ≤ 100"
        self.require(rule, lambda value: 0.01 <= value[0] <= value[1] <= 100, "scale")

    def _parts(self) -> dict[str, Any]:
        return {}  # flips are of all images here, and ask for no native ones

    @property
    def ignored(self) -> int | None:
        """The value of masks that stands for no class."""
        return None if self.ignore_index == -1 else self.ignore_index

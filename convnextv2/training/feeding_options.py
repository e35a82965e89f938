"""What the options of loading mean, and which exclude each other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from convnextv2.data.decoding import RESIZERS
from convnextv2.data.sources import CROP_SCALES

PLACES = ("loader", "device")
CENTRE_CROP = 0.875
"""Share of a side that validation keeps."""


def check_feeding(options: Any) -> None:
    """Raise ValueError on options of loading that are out of range or exclude each other."""
    options.require("must be at least 1", lambda value: value >= 1, "views", "cache_side")
    options.require(f"must be one of {', '.join(RESIZERS)}", RESIZERS.__contains__, "resize")
    options.require(f"must be one of {', '.join(PLACES)}", PLACES.__contains__, "augment_on")
    if options.batch_size % options.views:
        raise ValueError(f"`batch_size` {options.batch_size} counts crops, so `views` {options.views} must divide it")
    if options.cache is not None and Path(options.cache).resolve().is_relative_to(Path(options.data).resolve()):
        raise ValueError(
            f"`cache` {options.cache} lies in `data`, where its files would be read as images; move it out"
        )
    if options.cache_side is not None and options.cache is None:
        raise ValueError("`cache_side` is of the images in `cache`; name its folder too")
    if options.augment_on == "device" and options.resize != "pillow":
        raise ValueError("`resize` is of the loader, and with `augment_on` device it resizes nothing; leave it out")


def needed_side(size: tuple[int, int], smallest: float) -> int:
    """Pixels that the shorter side of an image must have so that nothing is enlarged that need not be.

    The smallest square crop, a share ``smallest`` of the area, is then as large as ``size`` (H, W), and so is what
    validation leaves of a side.
    """
    return math.ceil(max(size) * max(1 / math.sqrt(smallest), 1 / CENTRE_CROP))


def least_side(options: Any) -> int | None:
    """The shorter side that JPEG files may be reduced to while they are decoded; None for not at all."""
    if not options.reduce_jpeg or options.img_size is None:
        return None
    task = "finetune" if getattr(options, "task", None) == "finetune" else "pretrain"
    scale = getattr(options, "crop_scale", None) or CROP_SCALES[task]
    return needed_side(options.size, scale[0])

"""How the images of a set are read and prepared, and what a checkpoint says about that."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from heapq import nsmallest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convnextv2.data.datasets import ImageDataset
from convnextv2.data.decoding import USUAL, Wanted
from convnextv2.data.native import settled
from convnextv2.data.paths import PathList
from convnextv2.data.sources import DataError, FileSource, OpenedSource, Part, Subset
from convnextv2.data.statistics import BandStatistics, Ranges, stored_statistics
from convnextv2.data.transforms import (
    DEFAULT_STATISTICS,
    Augmentation,
    Statistics,
    Transform,
    check_statistics,
    image_transform,
)
from convnextv2.data.windows import windowed

READING = ("pixels", "bands", "no_data", "crop", "value_range")
"""Wishes of :class:`~.decoding.Wanted` that a checkpoint of native images keeps, by their names there."""
STATISTICS_SAMPLE = 256
"""Images from which mean and standard deviation are computed where there is no default."""
MOST_LOOKED_AT = 256


def wanted_of(images: Any) -> Wanted:
    """What is wanted of the files of a source, or of those that it takes its images from."""
    while isinstance(images, Subset):
        images = images.source
    return getattr(images, "wanted", USUAL)


def files_of(images: Any) -> Sequence[Path]:
    """All files of the source that a part was taken from: images, scenes, or shards that hold them."""
    while isinstance(images, Subset):
        images = images.source
    held: Any = next((getattr(images, name) for name in ("shards", "files", "paths") if hasattr(images, name)), ())
    return held if isinstance(held, PathList) else [path for path in held if isinstance(path, Path)]


def settled_source(opened: OpenedSource, asked: Wanted) -> OpenedSource:
    """A source of which it is decided, and said, whether its files are read in their own type.

    Raises:
        ValueError: if that was asked for, and it has no files that could be.
    """
    images, val = opened.train.images, opened.val
    if isinstance(images, FileSource) and images.wanted.pixels == "auto":
        wanted = settled(images.wanted, images.paths)
        if val is not None and isinstance(val.images, FileSource):
            val = replace(val, images=replace(val.images, wanted=wanted))
        opened = replace(opened, train=replace(opened.train, images=replace(images, wanted=wanted)), val=val)
    if wanted_of(opened.train.images).native:
        return windowed(replace(opened, description=f"{opened.description}, native pixels"), asked)
    if asked.native:
        what = f"{opened.description}: `pixels` native is of image files"
        raise ValueError(f"{what}; leave it out, with what belongs to it")
    return windowed(opened, asked)


def with_statistics(wanted: Wanted, mean: Any) -> Wanted:
    """What is wanted where a mean is given: that of photographs, in shares of the whole range, where nothing says that
    it is of native images."""
    return (
        replace(wanted, pixels="photo") if mean is not None and wanted.pixels == "auto" and not _set(wanted) else wanted
    )


def _set(wanted: Wanted) -> bool:
    return any(getattr(wanted, name) != getattr(USUAL, name) for name in READING)


def looks_native(data: str | Path, wanted: Wanted) -> bool:
    """Whether a folder is one of native images, by the first files in it: to be asked before it is opened."""
    if wanted.pixels != "auto" or wanted.window is not None or not Path(data).is_dir():
        return wanted.native or (wanted.pixels == "auto" and wanted.window is not None)
    found = list[Path]()
    for folder, folders, names in os.walk(data):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [Path(folder, name) for name in nsmallest(MOST_LOOKED_AT, names) if name[0] != "."]
        if len(found) >= MOST_LOOKED_AT:
            break
    return settled(wanted, found).native


def prepared_by(
    data: str | Path, opened: OpenedSource, part: Part, channels: int, mean: Any, std: Any
) -> tuple[Statistics, list[int], Callable[..., Transform]]:
    """Mean and standard deviation of images, numbers of those that cannot be read, and what makes a transform.

    Mean and standard deviation are those given, else those of the source, else those that are kept with native images
    or usual for photographs, else measured.

    Raises:
        ValueError: if those given are none, or one of the two is missing.
        DataError: if none of the images that are looked at can be read, or has data.
    """
    if (mean is None) != (std is None):
        raise ValueError("give both mean and std, or neither")
    wanted, bad, mean_given = wanted_of(part.images), list[int](), mean is not None
    ranges: Ranges | None = None
    known = opened.statistics or (None if wanted.native else DEFAULT_STATISTICS.get(channels))
    if mean is not None:
        check_statistics(mean, std, channels)
    elif known is not None:
        mean, std = known
    elif wanted.native and (kept := stored_statistics(Path(data), wanted, channels, files_of(part.images))):
        mean, std = kept["mean"], kept["std"]
        ranges = [(band["low"] or 0.0, band["high"] or 1.0) for band in kept["bands"]]
    else:
        found, bad = _measured(part, channels, opened.description)
        (mean, std), ranges = found.mean_std, found.ranges
    statistics = tuple(mean), tuple(std)
    if not wanted.native:
        return statistics, bad, image_transform
    if wanted.value_range is not None:
        ranges = [wanted.value_range] * channels
    elif mean_given:
        ranges = wanted.ranges
    return statistics, bad, partial(_native_transform, crop=wanted.crop, ranges=ranges)


def _measured(part: Part, channels: int, what: str) -> tuple[BandStatistics, list[int]]:
    """Of up to :data:`STATISTICS_SAMPLE` images, spread evenly; one that stands in for another counts once."""
    images = ImageDataset(part, torch.as_tensor, torch.as_tensor, ((), ()), what=what)
    statistics, seen = BandStatistics(channels), set[int]()
    for index in np.unique(np.linspace(0, len(images) - 1, STATISTICS_SAMPLE).round().astype(int)):
        found, decoded = images.load(int(index))
        if found not in seen:
            seen.add(found)
            statistics.add(decoded)
    if not any(band.count for band in statistics.bands):
        raise DataError(f"{what}: none of the {statistics.images} images looked at has data in any band")
    return statistics, images.replaced


def _native_transform(
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: Augmentation | None = None,
    *,
    crop: str,
    ranges: Ranges | None = None,
) -> Transform:
    from convnextv2.data.native_transforms import NativeTransform  # it imports torchvision, which takes a second

    return NativeTransform(size, (tuple(mean), tuple(std)), crop, augmentation, ranges)


def plain_transform(wanted: Wanted, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Transform:
    """What images are prepared by where nothing is drawn: for prediction."""
    return _native_transform(size, mean, std, crop=wanted.crop) if wanted.native else image_transform(size, mean, std)


def reading_of(images: Any) -> dict[str, Any]:
    """What a checkpoint keeps, beside normalisation and size, about how a data set was read; nothing of photographs."""
    wanted = wanted_of(images.source)
    if not wanted.native:
        return {}
    found = {name: getattr(wanted, name) for name in READING}
    ranges = getattr(images.plain_transform, "ranges", None)
    return {**found, "value_ranges": None if ranges is None else [list(one) for one in ranges]}


def as_trained(wanted: Wanted, metadata: Mapping[str, Any]) -> Wanted:
    """``wanted``, with what it leaves open as a checkpoint's metadata have it; photographs where they say nothing.

    Raises:
        ValueError: if an entry is none of those that :func:`reading_of` makes.
    """
    if metadata.get("pixels") != "native":
        return replace(wanted, pixels="photo") if wanted.pixels == "auto" and not _set(wanted) else wanted
    if wanted.pixels == "photo":
        return wanted
    found: dict[str, Any] = {"pixels": "native"}
    try:
        for name in READING[1:]:
            value = metadata.get(name)
            value = tuple(value) if isinstance(value, list) else value
            chosen = getattr(wanted, name)
            found[name] = chosen if chosen != getattr(USUAL, name) or value is None else value
        kept = metadata.get("value_ranges")
        found["ranges"] = None if kept is None else tuple((float(low), float(high)) for low, high in kept)
        result = replace(wanted, **found)
        numbers = [*(result.bands or ()), *(result.value_range or ()), result.no_data or 0]
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError("expected numbers")
    except (TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint's entries about how its images are read are damaged ({error})") from error
    return result


def display_ranges(metadata: Mapping[str, Any], statistics: Statistics) -> list[tuple[float, float]]:
    """Least and greatest value to show of each band of native images: as the checkpoint says, else two standard
    deviations about the mean."""
    kept = metadata.get("value_ranges")
    mean, std = statistics
    if isinstance(kept, list) and len(kept) == len(mean):
        return [(float(low), float(high)) if high > low else (float(low), float(low) + 1) for low, high in kept]
    return [(m - 2 * s, m + 2 * s) for m, s in zip(mean, std, strict=True)]


def shown(statistics: Statistics, ranges: Sequence[tuple[float, float]]) -> Statistics:
    """Mean and standard deviation that bring normalised values to [0, 1], as pictures take them."""
    mean, std = statistics
    spans = [high - low for low, high in ranges]
    scaled = tuple((m - low) / span for m, (low, _), span in zip(mean, ranges, spans, strict=True))
    return scaled, tuple(s / span for s, span in zip(std, spans, strict=True))


def shown_statistics(images: Any) -> Statistics:
    """Mean and standard deviation of a data set as pictures take them: of values in [0, 1]."""
    found = reading_of(images)
    return (
        shown((images.mean, images.std), display_ranges(found, (images.mean, images.std)))
        if found
        else (images.mean, images.std)
    )


def progress_of(images: Any) -> dict[str, Any]:
    """What a run of native images keeps to be resumed: how they were read, and normalised."""
    found = reading_of(images)
    return {**found, "mean": images.mean, "std": images.std} if found else {}


def keep_no_data(images: Any) -> bool:
    """Let batches of native images have NaN where there is no data, instead of 0; whether they are such images."""
    native = wanted_of(images.source).native
    if native:
        images.transform.keeps_no_data = True
    return native

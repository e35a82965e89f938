"""Class maps and overlays of image files, and scores of a network on pairs, by overlapping windows."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from convnextv2.data.bands import bands
from convnextv2.data.decoding import UnreadableImageError, Wanted
from convnextv2.data.images import has_image_suffix, to_bytes, why_unusable
from convnextv2.data.listings import walk_files
from convnextv2.data.loading import make_loader
from convnextv2.data.sources import DataError
from convnextv2.evaluation.inference import autocast_dtype
from convnextv2.files import atomic_path
from convnextv2.outputs import OutputError
from convnextv2.segmentation.datasets import EvaluatedPairs, WholeImages
from convnextv2.segmentation.loading import LoadedSegmenter
from convnextv2.segmentation.masks import Classes, palette, title
from convnextv2.segmentation.pairs import IMAGES, MASKS, PairSource
from convnextv2.segmentation.scenes import large_scene, write_classes
from convnextv2.segmentation.scores import PixelScores, confusion_of, pixel_scores
from convnextv2.segmentation.windows import Pixels, Windows, class_maps

OVERLAYS = "overlays"
MANY = 64
"""Images from which on processes decode them, unless told otherwise."""
Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Running:
    """How a network is run.

    Args:
        batch_size: windows at a time.
        workers: processes that decode images; None for up to four where there are many.
        precision: see :func:`~convnextv2.evaluation.inference.autocast_dtype`.
        progress: wraps the images.
    """

    windows: Windows
    batch_size: int = 8
    workers: int | None = None
    precision: str = "auto"
    progress: Progress = iter

    def samples(self, dataset: Any) -> Iterator[Any]:
        """Those of a data set, one by one."""
        workers = self.workers
        if workers is None:
            workers = min(4, os.cpu_count() or 1) if len(dataset) >= MANY else 0
        for batch in self.progress(make_loader(dataset, 1, workers)):
            yield from batch

    def maps(self, segmenter: LoadedSegmenter, images: Iterable[Pixels], **more: Any) -> Iterator[Tensor]:
        """As :func:`~.windows.class_maps`, which takes ``more``."""
        device, dtype = segmenter.device, autocast_dtype(self.precision, segmenter.device)

        def network(inputs: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                return segmenter.model(inputs)

        how: dict[str, Any] = {"batch_size": self.batch_size, "device": device, **more}
        return class_maps(network, images, segmenter.statistics, self.windows, **how)


def find_inputs(
    inputs: Sequence[str | Path], in_chans: int, wanted: Wanted
) -> tuple[dict[Path, Path], list[tuple[Path, str]]]:
    """Image files by what their results are called, a path without an ending: as below the folder that was named.

    Returns:
        Names to files; and files of folders that are no images, with reasons.

    Raises:
        DataError: if an input does not exist, there is none, or two results would have one name.
    """
    found, skipped = dict[Path, Path](), list[tuple[Path, str]]()
    for given in map(Path, inputs):
        if given.is_dir():
            files = [(path.relative_to(given), path) for path, _ in walk_files(given, skipped)]
        elif given.is_file():
            files = [(Path(given.name), given)]
        else:
            raise DataError(f"{title(given)}: {'not a regular file' if given.exists() else 'no such file or folder'}")
        for name, path in files:
            reason = None if has_image_suffix(path) or path == given else why_unusable(path, in_chans, False, wanted)
            if reason is not None:
                skipped.append((path, reason))
                continue
            other = found.setdefault(name.with_suffix(""), path)
            if other is not path and not other.samefile(path):
                raise DataError(
                    f"{title(path)} and {title(other)}: their results would both be called "
                    f"{title(name.with_suffix('.png'))}; predict them one after the other"
                )
    if not found:
        raise DataError(f"{', '.join(map(str, inputs)) or 'no input given'}: looked for image files and found none")
    return dict(sorted(found.items())), skipped


def check_folder(output: Path, inputs: Iterable[str | Path], overwrite: bool) -> None:
    """Refuse a folder for results that is or lies in one of images, holds one that is read, or anything else unless
    that is to be overwritten.

    Raises:
        OutputError: with the reason.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{title(output)}: is no folder; name one for the results")
    written = [(output / name).resolve() for name in (MASKS, OVERLAYS)]
    for given in map(Path, inputs):
        real = given.resolve()
        inside = real.is_dir() and any(place.is_relative_to(real) for place in (output.resolve(), *written))
        if inside or any(real.is_relative_to(place) for place in written):
            raise OutputError(f"{title(output)}: lies among what is read, {title(given)}; choose another folder")
    if (output / IMAGES).is_dir():
        raise OutputError(f"{title(output)}: holds {IMAGES}/, whose masks may lie in {MASKS}/; choose another folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(f"{title(output)}: is not empty; choose another folder, or say `overwrite`")


@dataclass(frozen=True)
class Written:
    """What became of an image: the files that were written, or the reason why it cannot be read."""

    image: Path
    mask: Path | None = None
    overlay: Path | None = None
    error: str = ""


def predict_files(
    segmenter: LoadedSegmenter,
    images: dict[Path, Path],
    output: Path,
    running: Running,
    *,
    overlays: bool = True,
    opacity: float = 0.5,
    wanted: Wanted,
) -> Iterator[Written]:
    """Write the classes of images, and pictures of them, as they come: ``masks/NAME.png`` and ``overlays/NAME.png``;
    at last of scenes, which are larger than ``max_pixels`` and are read by window, ``masks/NAME.tif`` alone.

    Masks have the values that the network was trained with, of the size of the image as it is shown; those of up to
    255 have a palette.

    Args:
        images: names to files, as :func:`find_inputs` gives them.
        output: see :func:`check_folder`.
        overlays, opacity: whether to write pictures, and how much of their colour is the classes'.
        wanted: of image files.

    Raises:
        OutputError: if a result would take the place of one of the images; before any is written.
        OSError: if one cannot be written.
    """
    files = list(images.values())
    folders = (MASKS, OVERLAYS) if overlays else (MASKS,)
    places = [[output / folder / name.with_name(f"{name.name}.png") for folder in folders] for name in images]
    scenes = [output / MASKS / name.with_name(f"{name.name}.tif") for name in images]
    read = {(status.st_dev, status.st_ino) for status in (path.stat() for path in files)}
    for place in (place for own in (*places, scenes) for place in own if place.exists()):
        if (place.stat().st_dev, place.stat().st_ino) in read:
            raise OutputError(f"{title(place)}: is one of the images that are read; choose another folder")
    unreadable, kept = dict[int, str](), dict[int, Tensor]()
    order: list[int] = []

    def readable() -> Iterator[Tensor]:
        for index, image, error in running.samples(WholeImages(files, segmenter.in_chans, wanted)):
            if error:
                unreadable[index] = error
                continue
            order.append(index)
            kept[index] = image
            yield image

    for classes in running.maps(segmenter, readable()):
        index = order.pop(0)
        image, numbers = kept.pop(index).numpy(), classes.numpy()
        pictures = [mask_picture(numbers, segmenter.classes)]
        if overlays:
            pictures.append(Image.fromarray(overlay(image, numbers, opacity, segmenter.ranges)))
        for place, picture in zip(places[index], pictures, strict=True):
            with atomic_path(place) as temporary:
                picture.save(temporary, format="PNG")
        yield Written(files[index], places[index][0], places[index][1] if overlays else None)
    for index, error in unreadable.items():
        reason = _predict_scene(segmenter, files[index], scenes[index], running, wanted, error)
        yield Written(files[index], error=reason) if reason else Written(files[index], scenes[index])


def _predict_scene(
    segmenter: LoadedSegmenter, path: Path, place: Path, running: Running, wanted: Wanted, error: str
) -> str:
    """Write the classes of an image that is too large to be read whole; why that is not possible, or nothing."""
    try:
        scene = large_scene(path, segmenter.in_chans, wanted, running.windows.size)
        if scene is None:
            return error

        def run(image: Pixels, taken: Callable[[Tensor], object]) -> None:
            deque(running.maps(segmenter, [image], taken=taken, progress=running.progress), maxlen=0)

        write_classes(path, scene, place, segmenter.classes, run)
    except UnreadableImageError as found:
        return str(found)
    return ""


def mask_picture(numbers: NDArray[np.uint8], classes: Classes) -> Image.Image:
    """A mask ``[H, W]`` of numbers of classes as an image of their values, with a palette where these are bytes."""
    picture = Image.fromarray(classes.decode(numbers))
    if picture.mode == "L":
        picture.putpalette(classes.colours().tobytes())
    return picture


def overlay(
    image: NDArray[Any], numbers: NDArray[np.uint8], opacity: float, ranges: Sequence[tuple[float, float]] = ()
) -> NDArray[np.uint8]:
    """``[H, W, 3]``: an image ``[H, W, C]`` (of more than three channels the first three) under the colours of its
    classes; the first class is left as it is. Of images that are no bytes ``ranges`` are shown, by channel."""
    channels = [0, 1, 2] if image.shape[-1] >= 3 else [0, 0, 0]
    result, colours = np.empty((*image.shape[:2], 3), np.uint8), palette(256)
    for rows in bands(result.shape):
        part, classes = (
            _bytes(image[rows][..., channels], [ranges[c] for c in channels] if ranges else ()),
            numbers[rows],
        )
        mixed = (1 - opacity) * part + opacity * colours[classes]
        result[rows] = np.where(classes[..., None] > 0, mixed.round().astype(np.uint8), part)
    return result


def _bytes(image: NDArray[Any], ranges: Sequence[tuple[float, float]]) -> NDArray[np.uint8]:
    """An image ``[H, W, 3]`` as bytes, black where there is no data: those that it has, the ranges spread over 0 to
    255, or without these the whole range of its type."""
    if image.dtype == np.uint8:
        return image
    if not ranges:
        return np.asarray(to_bytes(np.nan_to_num(image)))
    low, high = np.asarray(ranges, np.float32).T
    shares = np.nan_to_num((image - low) / (high - low)).clip(0, 1)
    return (shares * 255).round().astype(np.uint8)


def evaluate_pairs(
    segmenter: LoadedSegmenter, source: PairSource, running: Running
) -> tuple[PixelScores, list[tuple[Path, str]]]:
    """Scores of a network on images with masks, whole, in their own pixels; and those that cannot be read, and why.

    Raises:
        DataError: naming the file, if a mask does not fit its image or holds a value of no class.
        ValueError: if no pixel is of a class.
    """
    count = len(segmenter.classes.names)
    confusion, masks, unreadable = (
        torch.zeros(count, count, dtype=torch.int64),
        list[Tensor](),
        list[tuple[Path, str]](),
    )

    def readable() -> Iterator[Tensor]:
        for index, image, mask, error in running.samples(EvaluatedPairs(source)):
            if error:
                unreadable.append((source.paths[index], error))
                continue
            masks.append(mask)
            yield image

    images = 0
    for classes in running.maps(segmenter, readable()):
        confusion += confusion_of(classes, masks.pop(0), count)
        images += 1
    if not images:
        raise DataError(f"{title(unreadable[0][0])}: {unreadable[0][1]}; and no other image can be read")
    return pixel_scores(confusion, segmenter.classes.names, images), unreadable

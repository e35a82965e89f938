"""Folders of images and masks: ``images/NAME.jpg`` with ``masks/NAME.png``, checked before a run begins."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convnextv2.data.decoding import FORMATS, UnreadableImageError, Wanted, reasons
from convnextv2.data.folders import FULL_CHECK_BYTES
from convnextv2.data.images import load_image, why_unusable
from convnextv2.data.listings import walk_files
from convnextv2.data.sources import DataError
from convnextv2.segmentation.masks import CLASSES_FILE, Classes, inferred_classes, read_classes, read_mask, title

IMAGES, MASKS = "images", "masks"
LAYOUT = "DATA/images/NAME.jpg with DATA/masks/NAME.png, or both in DATA/train and DATA/val"


class Pair(NamedTuple):
    """A decoded image, and the numbers of its pixels' classes ``[H, W]``, uint8."""

    image: Any
    mask: NDArray[np.uint8]


def size_of(image: Any) -> tuple[int, int]:
    """(H, W) of a decoded image: Pillow's, an array ``[H, W, C]``, or a raster."""
    return image.size[::-1] if isinstance(image, Image.Image) else tuple(image.shape[:2])


def load_whole(path: Path, in_chans: int, wanted: Wanted) -> Any:
    """As :func:`~convnextv2.data.images.load_image`, but that an image which is too large is not read reduced: what is
    said of its pixels would be of others than its own."""
    image = load_image(path, in_chans, wanted)
    if not isinstance(image, Image.Image) or path.suffix.lower() == ".npy":  # an array is never reduced
        return image
    with reasons():
        try:
            with Image.open(path, formats=FORMATS) as header:
                wanted.check(*header.size)
        except Image.DecompressionBombError as error:
            raise wanted.too_large(str(error).partition(" exceeds")[0]) from error
    return image


@dataclass(frozen=True)
class PairSource:
    """Images and masks in files; a :class:`~convnextv2.data.sources.Source` of :class:`Pair`.

    Args:
        paths, masks: of the images, and of the mask of each.
    """

    paths: Sequence[Path]
    masks: Sequence[Path]
    in_chans: int
    classes: Classes
    wanted: Wanted

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Any:
        """A :class:`Pair`; UnreadableImageError if a file cannot be decoded, DataError if they are no pair."""
        path, mask_path = self.paths[index], self.masks[index]
        image = load_whole(path, self.in_chans, self.wanted)
        try:
            mask = read_mask(mask_path, self.wanted)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"its mask {title(mask_path)}: {error}") from error
        (height, width), (rows, columns) = size_of(image), mask.shape
        if (height, width) != (rows, columns):
            raise DataError(
                f"{title(mask_path)}: has {columns}×{rows} pixels, its image {title(path)} {width}×{height}"
            )
        return Pair(image, self.classes.encode(mask, mask_path))


@dataclass(frozen=True)
class Files:
    """Images and their masks as they were found.

    Args:
        skipped: files left out, and why.
    """

    images: list[Path]
    masks: list[Path]
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def take(self, numbers: Sequence[int]) -> Files:
        """Those of these numbers."""
        return replace(self, images=[self.images[i] for i in numbers], masks=[self.masks[i] for i in numbers])


def find_files(root: Path, in_chans: int, wanted: Wanted) -> Files:
    """The pairs below a folder with ``images`` and ``masks``, by the names of the files without their endings.

    Raises:
        DataError: if a folder is missing, an image has no mask or a mask no image, or none is usable.
    """
    for folder in (root / IMAGES, root / MASKS):
        if not folder.is_dir():
            raise DataError(f"{title(folder)}: no such folder; expected {LAYOUT}")
    skipped: list[tuple[Path, str]] = []
    plain = Wanted(wanted.max_pixels)  # masks are no measurements
    ways = (IMAGES, in_chans, wanted), (MASKS, 3, plain)
    found = [_by_stem(root / name, channels, asked, skipped) for name, channels, asked in ways]
    bad = {path.with_suffix("") for path, _ in skipped}
    images, masks = found
    for what, here, there, place in (("mask", images, masks, MASKS), ("image", masks, images, IMAGES)):
        alone = [key for key in sorted(here.keys() - there.keys()) if root / place / key not in bad]
        if alone:
            more = f" (nor have {len(alone) - 1} others)" if len(alone) > 1 else ""
            expected = title(root / place / alone[0])
            raise DataError(f"{title(here[alone[0]])}: has no {what}{more}; expected {expected}.png")
    both = sorted(images.keys() & masks.keys())
    if not both:
        first = f"; first of {len(skipped)} skipped: {title(skipped[0][0])} ({skipped[0][1]})" if skipped else ""
        raise DataError(f"{title(root)}: looked for images with masks and found no usable pair{first}")
    return Files([images[key] for key in both], [masks[key] for key in both], skipped)


def _by_stem(folder: Path, in_chans: int, wanted: Wanted, skipped: list[tuple[Path, str]]) -> dict[Path, Path]:
    """Usable files by their names in the folder without endings; what is left out is added to ``skipped``."""
    files = [path for path, _ in walk_files(folder, skipped)]
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        why = list(pool.map(lambda path: why_unusable(path, in_chans, False, wanted), files))
    skipped += [(path, text) for path, text in zip(files, why, strict=True) if text is not None]
    found: dict[Path, Path] = {}
    for path in (path for path, text in zip(files, why, strict=True) if text is None):
        key = path.relative_to(folder).with_suffix("")
        if key in found:
            raise DataError(f"{title(path)}: has the same name as {found[key].name}; expected one file a name")
        found[key] = path
    return found


def find_parts(root: Path, in_chans: int, wanted: Wanted, val_fraction: float, seed: int) -> tuple[Files, Files]:
    """Training and validation pairs: of ``train`` and ``val``, or drawn by ``seed``; DataError as :func:`find_files`,
    and where there are too few to draw from."""
    if (root / "train").is_dir() and (root / "val").is_dir():
        return find_files(root / "train", in_chans, wanted), find_files(root / "val", in_chans, wanted)
    files = find_files(root, in_chans, wanted)
    if len(files) < 2:
        raise DataError(f"{title(root)}: has one pair; expected at least two, of which one is to validate on")
    order = np.random.default_rng(seed).permutation(len(files)).tolist()
    count = min(len(files) - 1, max(1, round(len(files) * val_fraction)))
    train, val = files.take(sorted(order[count:])), files.take(sorted(order[:count]))
    return train, replace(val, skipped=[])


def find_classes(root: Path, names: str, ignored: int | None, files: Files, wanted: Wanted) -> Classes:
    """The classes: of ``names``, separated by commas; else of ``classes.json`` in ``root``; else as masks hold values,
    which are then all read. Raises ValueError or DataError if there are none."""
    if names:
        listed = tuple(name.strip() for name in names.split(","))
        if not all(listed):
            raise ValueError(f"`classes` should be names separated by commas, got {names!r}")
        return Classes(listed, tuple(range(len(listed))), ignored)
    if (root / CLASSES_FILE).is_file():
        try:
            return Classes(*read_classes(root / CLASSES_FILE), ignored)
        except ValueError as error:
            text = str(error).removeprefix(f"{root / CLASSES_FILE}: ")
            raise ValueError(f"{title(root / CLASSES_FILE)}: {text}") from error
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        values = set[int]().union(*pool.map(lambda path: _values(path, wanted), files.masks))
    return inferred_classes(values, ignored)


def _values(path: Path, wanted: Wanted) -> set[int]:
    try:
        return set(np.unique(read_mask(path, wanted)).tolist())
    except UnreadableImageError:
        return set()  # told when the pairs are checked


def open_pairs(files: Files, in_chans: int, classes: Classes, wanted: Wanted) -> tuple[PairSource, Files]:
    """The source of these files, of which those that cannot be decoded are left out. Small sets are read whole.

    Raises:
        DataError: naming the file, if an image and its mask differ in size, or a mask holds a value of no class; of
            large sets not before it is read.
    """
    source = PairSource(files.images, files.masks, in_chans, classes, wanted)
    size = sum(path.stat().st_size for path in (*files.images, *files.masks))
    if size > FULL_CHECK_BYTES:
        return source, files

    def why(number: int) -> str | None:
        try:
            source.load(number)
        except UnreadableImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = list(pool.map(why, range(len(files))))
    good = [number for number, text in enumerate(found) if text is None]
    skipped = [(files.images[number], text) for number, text in enumerate(found) if text is not None]
    if not good:
        raise DataError(f"{title(skipped[0][0])}: {skipped[0][1]}; and no other pair can be read")
    kept = replace(files.take(good), skipped=[*files.skipped, *skipped])
    return replace(source, paths=kept.images, masks=kept.masks), kept

"""Masks: images whose values are classes; and the classes' names, values and colours."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convnextv2.data.decoding import UnreadableImageError, Wanted, open_image, reasons
from convnextv2.data.names import shown
from convnextv2.data.sources import DataError
from convnextv2.segmentation.config import MOST_CLASSES

IGNORED = 255
"""The class, here, of pixels that belong to none."""
UNKNOWN = -1
VALUES = 2**16
CLASSES_FILE = "classes.json"
GRAY = {"1": np.uint8, "L": np.uint8, "P": np.uint8, "I;16": np.uint16, "I;16B": np.uint16, "I": np.int64}
"""Modes of Pillow that a mask may have."""


def read_mask(path: Path, wanted: Wanted) -> NDArray[np.integer[Any]]:
    """Values ``[H, W]`` of a mask, gray or of a palette (then its numbers); UnreadableImageError if it is none."""
    with reasons():
        with open_image(path, wanted) as image:
            if image.format in ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF"):
                raise UnreadableImageError(f"a mask in {image.format}, which may change values; expected PNG or TIFF")
            if image.mode not in GRAY:
                raise UnreadableImageError(
                    f"a mask of mode {image.mode}; expected a gray image, or a palette, whose values are classes"
                )
            values = np.asarray(image).astype(GRAY[image.mode])
        if values.ndim != 2 or values.min() < 0 or values.max() >= VALUES:
            raise UnreadableImageError(f"a mask holds values from 0 to {VALUES - 1} in rows and columns")
        return values


@dataclass(frozen=True)
class Classes:
    """What the values of masks stand for.

    Args:
        names: of the classes.
        values: the value of each in masks.
        ignored: the value of pixels that belong to no class; None where all do.

    Raises:
        ValueError: if there are too few or too many, or a name or value is there twice.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignored: int | None = IGNORED

    def __post_init__(self) -> None:
        if not 2 <= len(self.names) <= MOST_CLASSES:
            raise ValueError(f"expected 2 to {MOST_CLASSES} classes, got {len(self.names)}: {_some(self.names)}")
        if len(self.values) != len(self.names):
            raise ValueError(f"{len(self.names)} classes need as many values, got {len(self.values)}")
        for what, given in (("name", self.names), ("value", self.values)):
            if len(set(given)) < len(given):
                raise ValueError(f"two classes have the same {what}: {_some(given)}")
        if any(not isinstance(value, int) or not 0 <= value < VALUES for value in self.values):
            raise ValueError(
                f"values of classes must be whole numbers from 0 to {VALUES - 1}, got {_some(self.values)}"
            )
        if self.ignored in self.values:
            name = self.names[self.values.index(self.ignored)]
            raise ValueError(f"the value {self.ignored} of the class {name} is `ignore_index`; -1 ignores none")

    @cached_property
    def _numbers(self) -> NDArray[np.int16]:
        table = np.full(VALUES, UNKNOWN, np.int16)
        table[list(self.values)] = range(len(self.values))
        if self.ignored is not None:
            table[self.ignored] = IGNORED
        return table

    def encode(self, mask: NDArray[np.integer[Any]], path: Path) -> NDArray[np.uint8]:
        """Numbers of the classes of a mask, :data:`IGNORED` where there is none; DataError for any other value."""
        numbers = self._numbers[mask]
        if (unknown := numbers == UNKNOWN).any():
            row, column = (int(places[0]) for places in unknown.nonzero())
            known = f"{_some(self.values)}{'' if self.ignored is None else f', and {self.ignored} is ignored'}"
            where = f"holds the value {mask[row, column]} in row {row}, column {column}"
            raise DataError(f"{title(path)}: {where}; the classes have {known}")
        return numbers.astype(np.uint8)

    def decode(self, numbers: NDArray[np.uint8]) -> NDArray[np.uint8 | np.uint16]:
        """Values in a mask of numbers of classes."""
        kind = np.uint8 if max(self.values) < 256 else np.uint16
        return np.asarray(self.values, kind)[numbers]

    def colours(self) -> NDArray[np.uint8]:
        """``[256, 3]``: colours of the values of a mask of bytes."""
        colours = np.zeros((256, 3), np.uint8)
        colours[list(self.values)] = palette(len(self.values))
        return colours


def _some(items: Sequence[Any]) -> str:
    few = ", ".join(map(str, items[:8]))
    return few if len(items) <= 8 else f"{few} … {items[-1]}"


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and values of ``classes.json``: ``["sky", "road"]`` for 0 and 1, ``{"sky": 0, "road": 255}``, or
    ``{"0": "sky", "255": "road"}``; ValueError if it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON: {error}") from error
    if isinstance(found, list):
        found = dict(zip(found, range(len(found)), strict=True)) if _all(found, str) else None
    elif isinstance(found, dict) and found and all(key.isdecimal() for key in found) and _all(found.values(), str):
        if len(set(found.values())) < len(found):
            raise ValueError(f"{path}: two values have the same name")
        found = {name: int(value) for value, name in found.items()}
    if not isinstance(found, dict) or not _all(found.values(), int):
        raise ValueError(f'{path}: expected ["name", …] or {{"name": value, …}}, of all classes')
    pairs = sorted(found.items(), key=lambda pair: pair[1])
    return tuple(name for name, _ in pairs), tuple(value for _, value in pairs)


def _all(values: Iterable[Any], kind: type) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


def inferred_classes(values: Collection[int], ignored: int | None) -> Classes:
    """Classes from 0 to the largest value that masks hold, called by their numbers; DataError where that makes no
    sense."""
    seen = sorted(set(values) - {ignored})
    advice = f"name the classes and their values in {CLASSES_FILE}, as in " + '{"background": 0, "object": 255}'
    if ignored in values and len(seen) == 1:
        raise DataError(f"masks hold {seen[0]} and {ignored} alone, and {ignored} is `ignore_index`: set that to -1")
    if len(seen) < 2:
        raise DataError(f"masks hold the value {_some(seen) or 'none'} alone; expected at least two classes")
    if seen[-1] >= MOST_CLASSES or seen[-1] >= 2 * len(seen):
        raise DataError(f"masks hold {len(seen)} values up to {seen[-1]} ({_some(seen)}); {advice}")
    numbers = range(seen[-1] + 1)
    if ignored in numbers:
        numbers_kept = tuple(number for number in numbers if number != ignored)
        return Classes(tuple(map(str, numbers_kept)), numbers_kept, ignored)
    return Classes(tuple(map(str, numbers)), tuple(numbers), ignored)


def classes_from(metadata: Mapping[str, Any], names: Sequence[str]) -> Classes:
    """What a checkpoint says about masks, for classes of these names; ValueError if it cannot be."""
    values, ignored = metadata.get("class_values"), metadata.get("ignore_index", IGNORED)
    if values is None:
        values = range(len(names))
    elif not isinstance(values, list) or not _all(values, int):
        raise ValueError(f"its class_values should be whole numbers, got {values!r:.60}")
    if ignored is not None and (not _all([ignored], int) or not 0 <= ignored < VALUES):
        raise ValueError(f"its ignore_index should be a value of masks, got {ignored!r:.60}")
    ignored = None if ignored in values and "ignore_index" not in metadata else ignored
    return Classes(tuple(names), tuple(values), ignored)


def palette(count: int) -> NDArray[np.uint8]:
    """Colours ``[count, 3]`` of the first classes, PASCAL VOC's: bits of the number, spread over the channels."""
    numbers, colours = np.arange(count), np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def title(path: Path) -> str:
    """A file in messages."""
    return shown(str(path))

"""Pixel values in bands of rows: of arrays, of decoded images, of ``.npy`` files.

A wide type takes eight times the memory of its bytes, so nothing but the result is ever whole. Files are read, not
mapped: one that is cut meanwhile would end the process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convnextv2.data.decoding import UnreadableImageError, Wanted, reasons
from convnextv2.data.encoded import Stored

BAND = 2**20
"""Values in a band of rows, about."""


class Values(Protocol):
    """Numbers ``[rows, …]`` that are read in bands, such as an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, rows: slice, /) -> NDArray[Any]: ...


def bands(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis that hold about :data:`BAND` values each."""
    step = max(1, BAND // max(1, math.prod(shape[1:])))
    return (slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))


def value_range(values: Values) -> tuple[float, float]:
    """Least and greatest value; UnreadableImageError if one is not finite."""
    low, high = math.inf, -math.inf
    for rows in bands(values.shape):
        wide = values[rows].astype(np.float64)
        if not np.isfinite(wide).all():
            raise UnreadableImageError("pixels hold NaN or infinite values")
        low, high = min(low, float(wide.min())), max(high, float(wide.max()))
    return low, high


def on_white(image: Image.Image) -> Image.Image:
    """An image with transparency as RGB, composited on white."""
    page = Image.new("RGB", image.size)
    for rows in bands((image.height, image.width)):
        band = image.crop((0, rows.start, image.width, rows.stop)).convert("RGBA")
        band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        page.paste(band.convert("RGB"), (0, rows.start))
    return page


class Pixels:
    """The numbers of a decoded image, for what takes them in bands of rows."""

    def __init__(self, image: Image.Image, dtype: type[np.generic] | None = None) -> None:
        self._image = image
        row = np.asarray(image.crop((0, 0, image.width, 1)))
        self.shape, self.dtype = (image.height, *row.shape[1:]), np.dtype(dtype or row.dtype)

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        band = self._image.crop((0, rows.start or 0, self._image.width, rows.stop))
        return np.asarray(band).astype(self.dtype, copy=False)


@dataclass(frozen=True)
class ArrayFile:
    """The numbers ``[H, W, C]`` of a ``.npy`` file; ``[W, H, C]``, ``turned``, where columns lie together in it.

    Args:
        offset: where the numbers begin, in bytes.
        planes: whether the channels are stored one after the other.
    """

    path: Stored
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    offset: int
    planes: bool
    turned: bool

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        length, width, channels = rows.stop - (rows.start or 0), self.shape[1], self.shape[2]
        first, inner = (rows.start or 0) * width, 1 if self.planes else channels
        starts = [channel * self.shape[0] * width + first for channel in range(channels)] if self.planes else [first]
        read = list[NDArray[Any]]()
        with self.path.open("rb") as file:
            for start in starts:
                file.seek(self.offset + start * inner * self.dtype.itemsize)
                content = file.read(length * width * inner * self.dtype.itemsize)
                read.append(np.frombuffer(content, self.dtype, len(content) // self.dtype.itemsize))
        if any(len(values) < length * width * inner for values in read):
            raise UnreadableImageError("not a readable .npy array: it was cut while it was read")
        return np.concatenate([values.reshape(length, width, inner) for values in read], axis=-1)

    def upright(self, values: NDArray[Any]) -> NDArray[Any]:
        """``[H, W, C]`` from what was computed of all rows."""
        return values.swapaxes(0, 1) if self.turned else values


def open_array(path: Stored, in_chans: int, wanted: Wanted) -> ArrayFile:
    """The header of a ``.npy`` file with an array ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``.

    One channel stands in for three. Raises UnreadableImageError if it is another array, too large, or truncated.
    """
    with reasons("not a readable .npy array: ", path), path.open("rb") as file:
        old = np.lib.format.read_magic(file) == (1, 0)
        header = np.lib.format.read_array_header_1_0(file) if old else np.lib.format.read_array_header_2_0(file)
        offset, there = file.tell(), path.stat().st_size
    stored, by_columns, dtype = header
    if dtype.kind not in "biuf" or len(stored) not in (2, 3) or min(stored) < 1:
        raise UnreadableImageError("expected a .npy array of numbers [H, W], [H, W, C] or [C, H, W]")
    whole = (*stored, 1)[:3]
    for channels in (in_chans, 1, 3) if in_chans in (1, 3) else (in_chans,):
        if channels in (whole[2], whole[0]):
            break
    else:
        raise UnreadableImageError(f"has the shape {stored}, expected {in_chans} channels first or last")
    first = whole[2] != channels
    height, width = whole[1:] if first else whole[:2]
    wanted.check(width, height)
    if there - offset < (expected := math.prod(stored) * dtype.itemsize):
        raise UnreadableImageError(f"not a readable .npy array: truncated, {there - offset} of {expected} bytes")
    sides, turned = ((width, height), True) if by_columns else ((height, width), False)
    if sides[0] == 1:  # a line in either sense: let it be many rows
        sides, turned = sides[::-1], not turned
    return ArrayFile(path, (*sides, channels), dtype, offset, first != by_columns, turned)

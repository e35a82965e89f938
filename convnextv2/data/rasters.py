"""Pixels in the type and the units of their file, and which of them are data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convnextv2.data.decoding import UnreadableImageError, Wanted

LUMINANCE = (0.299, 0.587, 0.114)
"""Of red, green and blue in the gray that stands in for them: ITU-R 601, as Pillow's."""


@dataclass(frozen=True, eq=False)
class Raster:
    """An image as its file has it.

    Args:
        values: ``[H, W, C]``: uint8, uint16, int16 or float32; what the file has in a wider type is rounded to float32.
        valid: bool ``[H, W, C]``, False where there is no data; None where all is data.
    """

    values: NDArray[Any]
    valid: NDArray[np.bool_] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.values.shape

    def __getitem__(self, part: Any) -> Raster:
        """A part of the rows and columns, not copied."""
        return Raster(self.values[part], None if self.valid is None else self.valid[part])

    def floats(self) -> NDArray[np.float32]:
        """float32 ``[H, W, C]``, NaN where there is no data; a copy."""
        values = self.values.astype(np.float32)
        if self.valid is not None:
            values[~self.valid] = np.nan
        return values


Decoded = Image.Image | NDArray[np.float32] | Raster
"""What a source gives: an RGB image, an array ``[H, W, C]`` where C is neither 1 nor 3, or a raster where ``pixels``
native is wanted."""


def chosen_bands(count: int, in_chans: int, wanted: Wanted) -> list[int]:
    """Numbers, from 0, of the bands to read of a file that has ``count``; three where one is to be made of colours.

    Raises:
        UnreadableImageError: if the file has not the bands that are wanted.
    """
    if wanted.bands is not None:
        if len(wanted.bands) != in_chans:
            raise UnreadableImageError(f"`bands` {wanted.shown_bands} are {len(wanted.bands)}, expected {in_chans}")
        if missing := [band for band in wanted.bands if band > count]:
            raise UnreadableImageError(f"has {count} band(s), and no {missing[0]} of `bands` {wanted.shown_bands}")
        return [band - 1 for band in wanted.bands]
    if count == 1 and in_chans == 3:
        return [0, 0, 0]
    if count == in_chans or (count == 3 and in_chans == 1):
        return list(range(count))
    raise UnreadableImageError(f"has {count} band(s), expected {in_chans}; `bands` says which to take")


def raster_of(
    values: NDArray[Any], in_chans: int, wanted: Wanted, *, no_data: float | None = None, valid: Any = None
) -> Raster:
    """The raster of bands ``[H, W, C]``, as they were chosen, of any real type.

    Args:
        values: the numbers.
        in_chans: channels of the result: three bands become one by :data:`LUMINANCE`.
        wanted: what is wanted; its ``no_data`` counts beside the file's own.
        no_data: the value that stands for no data in this file, if any.
        valid: bool, to be broadcast to ``[H, W, C]``: what else the file says about which pixels are data.
    """
    if values.dtype.kind not in "biuf":
        raise UnreadableImageError(f"pixels of type {values.dtype} are no real numbers")
    missing: Any = None if valid is None else ~np.broadcast_to(valid, values.shape)
    for value in {value for value in (no_data, wanted.no_data) if value is not None}:
        missing = _either(missing, _equals(values, value))
    if values.dtype.kind == "f":
        missing = _either(missing, ~np.isfinite(values))
    if values.dtype.kind == "b":
        values = values.astype(np.uint8)
    if values.dtype == np.int8:
        values = values.astype(np.int16)
    if values.dtype.kind == "f" or values.dtype.itemsize > 2:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        missing = _either(missing, ~np.isfinite(values))  # beyond what float32 holds
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.shape[2] == 3 and in_chans == 1 and wanted.bands is None:
        gray = values.astype(np.float64) @ np.array(LUMINANCE)
        values = (np.rint(gray) if values.dtype.kind in "iu" else gray).astype(values.dtype)[..., None]
        missing = None if missing is None else missing.any(2, keepdims=True)
    return Raster(values, ~missing if missing is not None and missing.any() else None)


def _equals(values: NDArray[Any], value: float) -> NDArray[np.bool_] | None:
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return np.isnan(values) if np.isnan(value) else values == values.dtype.type(value)
    if values.dtype.kind == "b" or not float(value).is_integer():
        return None
    limits = np.iinfo(values.dtype)
    return values == values.dtype.type(int(value)) if limits.min <= value <= limits.max else None


def _either(first: NDArray[np.bool_] | None, second: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    return second if first is None else first if second is None else first | second

"""Images far larger than a network takes, read by window and never whole: TIFF, ``.npy`` and zarr arrays.

Decoded are the tiles, strips or chunks that a window touches; of arrays that are stored as they are its rows are read.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convnextv2.data.decoding import Size, UnreadableImageError, Wanted, is_zarr, reasons
from convnextv2.data.native import array_header, array_sides, band_count
from convnextv2.data.rasters import Raster, chosen_bands, raster_of
from convnextv2.data.scene_tiff import tiff_scene
from convnextv2.data.stored import SEGMENT_BYTES, Box, OpenFile, RawRows, Stored
from convnextv2.data.tiff import is_tiff, need

OPEN_FILES = 16
"""Files that a process keeps open."""
SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".npy")


@dataclass(frozen=True, eq=False)
class Scene:
    """An image that is read by window.

    Args:
        stored: what its file gives.
        in_chans, wanted: as of :func:`~.native.load_native`.
    """

    stored: Stored
    in_chans: int
    wanted: Wanted

    @property
    def size(self) -> Size:
        """(H, W) in pixels."""
        return self.stored.size

    @property
    def may_lack_data(self) -> bool:
        """Whether there can be pixels without data."""
        return self.stored.may_lack_data or self.wanted.no_data is not None

    def read(self, box: Box) -> Raster:
        """The pixels of a box that lies in the image; UnreadableImageError if they cannot be decoded."""
        with reasons("cannot be decoded there: "):
            values, valid = self.stored.cut(box)
            return raster_of(values, self.in_chans, self.wanted, no_data=self.stored.no_data, valid=valid)


def is_scene(path: Path) -> bool:
    """Whether what is of that name would be read by window, by the name alone."""
    return is_zarr(path) or (path.suffix.lower() in SUFFIXES and path.is_file())


def open_scene(path: Path, in_chans: int, wanted: Wanted) -> Scene:
    """An image file, its header read, for windows of up to ``wanted.window``; the last ones are kept, with their files
    open.

    Raises:
        UnreadableImageError: with the reason, if that is not possible.
    """
    return _opened(path, in_chans, wanted, os.getpid())  # a process that was forked opens its own


@lru_cache(maxsize=OPEN_FILES)
def _opened(path: Path, in_chans: int, wanted: Wanted, process: int) -> Scene:
    with reasons(path=None if path.is_dir() else path):
        stored = _stored(path, in_chans, wanted)
        window = [min(sides) for sides in zip(stored.size, wanted.window or stored.size, strict=True)]
        wanted.check_values(window[1], window[0], stored.bands)
        return Scene(stored, in_chans, wanted)


def _stored(path: Path, in_chans: int, wanted: Wanted) -> Stored:
    if path.is_dir():
        return _zarr(path, in_chans, wanted)
    with path.open("rb") as file:
        start = file.read(8)
    if is_tiff(start):
        return tiff_scene(path, in_chans, wanted)
    if start[:6] == np.lib.format.MAGIC_PREFIX:
        return _npy(path, in_chans, wanted)
    raise UnreadableImageError("is no TIFF, .npy or .zarr, which are the formats that are read by `window`")


def scene_pixels(path: Path, in_chans: int, wanted: Wanted) -> int:
    """Width × height by the header; UnreadableImageError if the file cannot be read by window."""
    return math.prod(open_scene(path, in_chans, wanted).size)


def scene_bands(path: Path) -> int | None:
    """Bands of an image of any size by its header; None where it cannot be read."""
    if not path.is_dir():
        return band_count(path)
    try:
        with reasons():
            stored = tuple(_zarr_array(path).shape)
            return 1 if len(stored) == 2 else min(stored[0], stored[2])
    except UnreadableImageError:
        return None


def _npy(path: Path, in_chans: int, wanted: Wanted) -> Stored:
    with path.open("rb") as opened:
        stored, by_columns, dtype = array_header(opened)
        offset = opened.tell()
    height, width, bands, first = array_sides(stored, in_chans, wanted)
    _check_numbers(dtype)
    chosen, file = chosen_bands(bands, in_chans, wanted), OpenFile(path)
    if file.size - offset < (expected := math.prod(stored) * dtype.itemsize):
        raise UnreadableImageError(f"truncated, {file.size - offset} of {expected} bytes")
    planes, inner = (bands, 1) if first != by_columns else (1, bands)  # by columns all axes are the other way round
    rows = RawRows(file, offset, dtype, planes, (height, width), inner, by_columns)
    return Stored(
        (height, width), len(chosen), lambda box: (rows.cut(box, chosen), None), (1, width), None, dtype.kind == "f"
    )


def _zarr_array(path: Path) -> Any:
    library = need("zarr", "a zarr array")
    with reasons("not a readable zarr array: "):
        found = library.open(os.fspath(path), mode="r")
    if not hasattr(found, "shape"):
        inside = ", ".join(sorted(found)[:3])
        raise UnreadableImageError(f"is a group of zarr arrays ({inside}); name one of them")
    return found


def _zarr(path: Path, in_chans: int, wanted: Wanted) -> Stored:
    array = _zarr_array(path)
    height, width, bands, first = array_sides(tuple(array.shape), in_chans, wanted)
    _check_numbers(array.dtype)
    chosen, chunk = chosen_bands(bands, in_chans, wanted), tuple(array.chunks)
    if (size := math.prod(chunk) * array.dtype.itemsize) > SEGMENT_BYTES:
        raise UnreadableImageError(f"its chunks of {chunk} take {size / 2**20:.0f} MiB each; write it in smaller ones")

    def cut(box: Box) -> tuple[NDArray[Any], Any]:
        rows, columns = slice(box[0], box[2]), slice(box[1], box[3])
        values = np.asarray(array[(slice(None), rows, columns) if first else (rows, columns)])
        values = np.moveaxis(values, 0, -1) if first else values.reshape(*values.shape[:2], bands)
        return values[..., chosen], None

    no_data = array.attrs.get("_FillValue")  # xarray's
    no_data = float(no_data) if isinstance(no_data, int | float) else None
    block = chunk[1:] if first else chunk[:2]
    lacks = no_data is not None or array.dtype.kind == "f"
    return Stored((height, width), len(chosen), cut, block, no_data, lacks)


def _check_numbers(dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biuf":
        raise UnreadableImageError(f"pixels of type {dtype} are no real numbers")

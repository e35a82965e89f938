"""TIFF files by window: the tiles or strips that a window touches are decoded, those of the bands that are wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convnextv2.data.decoding import UnreadableImageError, Wanted, reasons
from convnextv2.data.stored import KEPT_BYTES, SEGMENT_BYTES, Box, KeptSegments, OpenFile, RawRows, Stored
from convnextv2.data.tiff import (
    JPEG,
    MOST_PIXELS,
    ORIENTATION,
    TiffHeader,
    by_gdal,
    gdal,
    need_codecs,
    open_by_gdal,
    tag_of,
    tiff_header,
)

RETILE = "write it in tiles, by: gdal_translate -co TILED=YES -co COMPRESS=DEFLATE IN.tif OUT.tif"


def tiff_scene(path: Path, in_chans: int, wanted: Wanted) -> Stored:
    """A TIFF of any size, as :func:`~.tiff.load_tiff` reads it; UnreadableImageError if it cannot be read by window."""
    free = replace(wanted, max_pixels=MOST_PIXELS)
    with reasons("not a readable TIFF: ", path), tiff_header(path, in_chans, free) as header:
        if (turned := int(tag_of(header.page, ORIENTATION, 1))) != 1:
            raise UnreadableImageError(f"its orientation is {turned}; windows are of images that are stored upright")
        need_codecs(header.page)
        return _by_gdal(path, header) if by_gdal(header) else _by_segments(path, header)


def _block(page: Any) -> tuple[int, int]:
    """(H, W) of a tile or strip."""
    if page.is_tiled:
        return int(page.tilelength), int(page.tilewidth)
    return min(int(page.rowsperstrip), int(page.imagelength)), int(page.imagewidth)


def _check_block(page: Any) -> None:
    """Raise UnreadableImageError for tiles or strips that are too large to be decoded for a window."""
    height, width = _block(page)
    samples = int(page.samplesperpixel) if int(page.planarconfig) == 1 else 1
    size = height * width * samples * page.dtype.itemsize
    if size > SEGMENT_BYTES:
        kind = "tiles" if page.is_tiled else "strips"
        raise UnreadableImageError(f"its {kind} of {width}×{height} pixels take {size / 2**20:.0f} MiB each; {RETILE}")


def _by_segments(path: Path, header: TiffHeader) -> Stored:
    file, page = OpenFile(path), header.page
    bands = [*header.bands, *([] if header.alpha is None else [header.alpha])]
    if len(header.pages) > 1:
        sources = [(_pixels(file, header.pages[band]), [0]) for band in header.bands]
    else:
        sources = [(_pixels(file, page), bands)]

    def cut(box: Box) -> tuple[NDArray[Any], Any]:
        parts = [source.cut(box, chosen) for source, chosen in sources]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        return (values, None) if header.alpha is None else (values[..., :-1], values[..., -1:] > 0)

    lacks = header.no_data is not None or header.alpha is not None or page.dtype.kind == "f"
    size = int(page.imagelength), int(page.imagewidth)
    return Stored(size, len(header.bands), cut, _block(page), header.no_data, lacks)


def _pixels(file: OpenFile, page: Any) -> RawRows | _Segments:
    if page.is_contiguous and not page.is_tiled and int(page.fillorder) == 1:
        size, samples = (int(page.imagelength), int(page.imagewidth)), int(page.samplesperpixel)
        planes, inner = (samples, 1) if int(page.planarconfig) == 2 else (1, samples)
        kind = page.dtype.newbyteorder(page.parent.byteorder)
        there = math.prod(size) * samples * kind.itemsize
        if page.dataoffsets[0] + there > file.size:
            raise UnreadableImageError(f"truncated, {file.size - page.dataoffsets[0]} of {there} bytes")
        return RawRows(file, int(page.dataoffsets[0]), kind, planes, size, inner)
    return _Segments(file, page)


class _Segments:
    """Tiles or strips of a page."""

    def __init__(self, file: OpenFile, page: Any) -> None:
        _check_block(page)
        self._file, self._decode = file, page.decode
        self._more = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression == JPEG else {}
        self._size, self._block = (int(page.imagelength), int(page.imagewidth)), _block(page)
        self._grid = tuple(math.ceil(whole / part) for whole, part in zip(self._size, self._block, strict=True))
        self._separate, self._samples = int(page.planarconfig) == 2, int(page.samplesperpixel)
        self._dtype, self._empty = page.dtype, page.nodata
        self._places = np.array([page.dataoffsets, page.databytecounts], np.int64)
        expected = math.prod(self._grid) * (self._samples if self._separate else 1)
        if self._places.shape[1] < expected:
            raise UnreadableImageError(f"lists {self._places.shape[1]} of {expected} strips or tiles")
        if (end := int(self._places.sum(0).max())) > file.size:
            raise UnreadableImageError(f"truncated, {file.size} of {end} bytes")
        self._kept = KeptSegments(self._segment)

    def cut(self, box: Box, bands: Sequence[int]) -> NDArray[Any]:
        """``[h, w, bands]``, these by number."""
        if self._separate:
            return np.concatenate([self._plane(box, band, [0]) for band in bands], axis=-1)
        return self._plane(box, 0, bands)

    def _plane(self, box: Box, plane: int, bands: Sequence[int]) -> NDArray[Any]:
        top, left, bottom, right = box
        (high, wide), (down, across) = self._block, self._grid
        found = np.empty((bottom - top, right - left, len(bands)), self._dtype)
        every = list(bands) == list(range(1 if self._separate else self._samples))
        for row in range(top // high, (bottom - 1) // high + 1):
            for column in range(left // wide, (right - 1) // wide + 1):
                segment = self._kept[(plane * down + row) * across + column]
                first, start = max(top, row * high), max(left, column * wide)
                last, end = min(bottom, row * high + high), min(right, column * wide + wide)
                part = segment[first - row * high : last - row * high, start - column * wide : end - column * wide]
                found[first - top : last - top, start - left : end - left] = part if every else part[..., list(bands)]
        return found

    def _segment(self, index: int) -> NDArray[Any]:
        """``[h, w, samples]``; one that the file leaves out is of no data, or 0 where it declares none."""
        offset, count = self._places[:, index].tolist()
        data = self._file.read(offset, count) if offset and count else None
        values, _, shape = self._decode(data, index, **self._more)
        return np.full(shape[1:], self._empty, self._dtype) if values is None else values[0]


def _by_gdal(path: Path, header: TiffHeader) -> Stored:
    """By rasterio, which knows mask bands."""
    if not header.page.is_contiguous:
        _check_block(header.page)
    numbers = [band + 1 for band in header.bands]
    alone: dict[str, Any] = {"GDAL_CACHEMAX": KEPT_BYTES}
    with gdal(**alone):
        image = open_by_gdal(path, header)
        masked = any("all_valid" not in map(_name, image.mask_flag_enums[band]) for band in header.bands)

    def cut(box: Box) -> tuple[NDArray[Any], Any]:
        window = (box[0], box[2]), (box[1], box[3])
        with gdal(**alone):
            values = np.moveaxis(image.read(numbers, window=window), 0, -1)
            valid = np.moveaxis(image.read_masks(numbers, window=window), 0, -1) > 0 if masked else None
        return values, valid

    lacks = masked or header.no_data is not None or header.page.dtype.kind == "f"
    return Stored((image.height, image.width), len(numbers), cut, _block(header.page), header.no_data, lacks)


def _name(flag: Any) -> str:
    return str(getattr(flag, "name", flag))

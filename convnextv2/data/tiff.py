"""TIFF files with all the bits that they have: any number of bands, pages as bands, tiles, compression, no-data values.

tifffile reads them, with imagecodecs; georeferenced ones rasterio where it is installed, which also knows mask bands.
What a file claims is compared with what is wanted before anything is decoded, and codecs that believe what a segment
says about its own size are given those only whose size is as the file says.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convnextv2.data.decoding import USUAL, UnreadableImageError, Wanted, reasons
from convnextv2.data.encoded import Stored, openable
from convnextv2.data.rasters import Raster, chosen_bands, raster_of
from convnextv2.messages import one_line

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
INSTALL = "pip install 'sparse-fcmae[science]'"
BOUNDED = {1, 5, 8, 32773, 32946, 34925, 50000}
"""Compressions whose decoder stops at the size that it is told: none, LZW, deflate, PackBits, LZMA, zstd."""
JPEG, JPEG_2000 = 7, (33003, 33004, 33005, 34712)
ORIENTATION, SUBFILE, EXTRA_SAMPLES, GDAL_NO_DATA, PALETTE = 274, 254, 338, 42113, 3
GEOREFERENCED = (33550, 34264, 34735)
SEGMENT_SIZES = (278, 322, 323)
REDUCED_OR_MASK = 1 | 4
ALPHA = (1, 2)
MOST_PAGES = 1024
"""Pages that are counted as bands."""
MOST_PIXELS = 2**40
"""Width × height of a file of which a header or windows are read."""
MOST_SEGMENTS = 2**20
"""Strips or tiles of a page: a list that is longer takes seconds before a pixel is read."""


@dataclass(frozen=True)
class TiffHeader:
    """What is to be read of a file.

    Args:
        file: tifffile's.
        pages: one, or those whose only bands are the bands of the image.
        bands: numbers of those to read, from 0, among the bands of the page or among the pages.
        alpha: number of the band that says which pixels are data, if there is one.
        no_data: the value that the file declares.
    """

    file: Any
    pages: Sequence[Any]
    bands: Sequence[int]
    alpha: int | None
    no_data: float | None

    @property
    def page(self) -> Any:
        """The first."""
        return self.pages[0]


def is_tiff(start: bytes) -> bool:
    """Whether a file that begins so is a TIFF, or a BigTIFF."""
    return start[:4] in MAGIC


def need(module: str, what: str) -> Any:
    """An optional library; UnreadableImageError that says what to install where it is not there."""
    logging.getLogger(module).setLevel(logging.CRITICAL)  # what it says of damaged files names no file
    if importlib.util.find_spec(module) is None:
        raise UnreadableImageError(f"{what} needs {module}: {INSTALL}")
    return importlib.import_module(module)


def tiff_pixels(path: Stored, in_chans: int, wanted: Wanted) -> int:
    """Width × height by the header; UnreadableImageError if the file cannot be what is wanted."""
    with reasons("not a readable TIFF: ", path), tiff_header(path, in_chans, wanted) as header:
        return int(header.page.imagewidth * header.page.imagelength)


def load_tiff(path: Stored, in_chans: int, wanted: Wanted) -> Raster:
    """The bands that are wanted; UnreadableImageError, with the reason, if that is not possible."""
    with reasons("not a readable TIFF: ", path), tiff_header(path, in_chans, wanted) as header:
        page = header.page
        if by_gdal(header):
            values, valid = _by_rasterio(path, header)
        else:
            values, valid = _by_tifffile(header)
        raster = raster_of(values, in_chans, wanted, no_data=header.no_data, valid=valid)
        return _upright(raster, int(tag_of(page, ORIENTATION, 1)))


def tiff_bands(path: Stored) -> int:
    """Bands of the first page without alpha, or the number of its pages if they have one each."""
    tifffile = need("tifffile", "a TIFF of more than 8 bits")
    with reasons("not a readable TIFF: ", path), tifffile.TiffFile(openable(path)) as file:
        first = _page(file, 0)
        of_any_size = replace(USUAL, max_pixels=MOST_PIXELS)
        _check_page(first, of_any_size)
        if int(first.samplesperpixel) > 1:
            return int(first.samplesperpixel) - (_alpha(first) is not None)
        return 1 + len(_further_pages(file, first, MOST_PAGES, of_any_size))


@contextlib.contextmanager
def tiff_header(path: Stored, in_chans: int, wanted: Wanted) -> Iterator[TiffHeader]:
    """What is to be read of a file, checked; UnreadableImageError if it cannot be what is wanted."""
    tifffile = need("tifffile", "a TIFF of more than 8 bits")
    with tifffile.TiffFile(openable(path)) as file:
        pages = [_page(file, 0)]
        first = pages[0]
        _check_page(first, wanted)
        count = int(first.samplesperpixel)
        if count == 1:
            most = max(wanted.bands) if wanted.bands is not None else in_chans + 1
            pages += _further_pages(file, first, most, wanted)
            count = len(pages) if len(pages) in (1, in_chans) or wanted.bands is not None else 1
            if count == 1 and len(pages) > 1 and in_chans != 1:
                found = f"{len(pages)} pages" if len(pages) <= in_chans else f"more than {in_chans} pages"
                raise UnreadableImageError(f"has {found} of one band, expected {in_chans}; `bands` says which to take")
        alpha = _alpha(first) if count > 1 and len(pages) == 1 else None
        if alpha == count - 1 and in_chans != count and (wanted.bands is None or alpha + 1 not in wanted.bands):
            count -= 1
        else:
            alpha = None
        bands = chosen_bands(count, in_chans, wanted)
        wanted.check_values(first.imagewidth, first.imagelength, max(count, len(bands)))
        yield TiffHeader(file, pages[:count] if len(pages) > 1 else pages, bands, alpha, _no_data(first))


def _page(file: Any, number: int) -> Any:
    try:
        return file.pages[number]
    except IndexError:
        if number:
            return None
        raise UnreadableImageError("has no page") from None


def _further_pages(file: Any, first: Any, most: int, wanted: Wanted) -> list[Any]:
    """Pages after the first that are as it is, no overviews and no masks; no more than are asked for."""
    found, number = list[Any](), 1
    while len(found) + 1 < most and (page := _page(file, number)) is not None:
        if not int(tag_of(page, SUBFILE, 0)) & REDUCED_OR_MASK:
            _check_page(page, wanted)
            if page.shape != first.shape or page.dtype != first.dtype:
                raise UnreadableImageError("its pages differ in size or type")
            found.append(page)
        number += 1
        if number > 4 * most + 64:
            break
    return found


def _check_page(page: Any, wanted: Wanted) -> None:
    """Raise UnreadableImageError for what is too large, and for what decoders cannot be held to."""
    width, height, samples = int(page.imagewidth), int(page.imagelength), int(page.samplesperpixel)
    if width < 1 or height < 1 or samples < 1:
        raise UnreadableImageError(f"claims {width}×{height} pixels of {samples} band(s)")
    wanted.check_values(width, height, samples)
    if int(page.imagedepth) != 1 or len(page.shape) > 3:
        raise UnreadableImageError("is a volume in one page, which is not read; write a page for each plane")
    if page.dtype is None:
        raise UnreadableImageError(f"its {page.bitspersample} bits a value are of a kind that is not read")
    if int(page.photometric) == PALETTE:
        raise UnreadableImageError("has a palette of colours, which `pixels` photo reads")
    rows, across, down = (int(tag_of(page, tag, 0)) for tag in SEGMENT_SIZES)
    across, down = (across, down) if page.is_tiled else (width, min(rows or height, height))
    if across < 1 or down < 1 or across * down > max(4 * wanted.max_pixels, 2**20):
        raise UnreadableImageError(f"its tiles claim {across}×{down} pixels")
    if len(page.dataoffsets) > MOST_SEGMENTS:
        raise UnreadableImageError(f"has {len(page.dataoffsets)} strips or tiles, more than {MOST_SEGMENTS}")
    there = int(page.parent.filehandle.size)
    if (longest := max((int(count) for count in page.databytecounts), default=0)) > there:
        raise UnreadableImageError(f"a strip or tile claims {longest} bytes of a file of {there}")
    compression = int(page.compression)
    if compression == JPEG or compression in JPEG_2000:
        _check_segments(page, across, down, compression == JPEG)
    elif compression not in BOUNDED:
        name = getattr(page.compression, "name", compression)
        raise UnreadableImageError(f"its compression, {name}, is not read; LZW, deflate, zstd and JPEG are")


def _check_segments(page: Any, across: int, down: int, is_jpeg: bool) -> None:
    """Compare the size that each segment states for itself with the one that the file gives it."""
    handle = page.parent.filehandle
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        handle.seek(offset)
        start = handle.read(min(int(count), 2**16))
        size = jpeg_size(start) if is_jpeg else _jpeg_2000_size(start)
        if size is None or size[0] > across or size[1] > down:
            said = "no size" if size is None else f"{size[0]}×{size[1]} pixels"
            raise UnreadableImageError(f"a segment of {across}×{down} pixels states {said} for itself")


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) that a JPEG or JPEG-LS stream states."""
    place = 2
    while place + 9 < len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], struct.unpack_from(">H", data, place + 2)[0]
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            height, width = struct.unpack_from(">HH", data, place + 5)
            return width, height
        place += 2 + length
    return None


def _jpeg_2000_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG 2000 codestream, in a file format or bare."""
    place = data.find(b"\xff\x4f\xff\x51")
    if place < 0 or place + 24 > len(data):
        return None
    right, bottom, left, top = struct.unpack_from(">IIII", data, place + 8)
    return right - left, bottom - top


def need_codecs(page: Any) -> None:
    """Raise UnreadableImageError where a page needs imagecodecs, and it is not there."""
    if int(page.compression) not in (1, 8, 32946, 32773) or int(page.predictor) != 1 or page.bitspersample % 8:
        need("imagecodecs", f"TIFF compression {getattr(page.compression, 'name', page.compression)}")


def _by_tifffile(header: TiffHeader) -> tuple[NDArray[Any], Any]:
    page = header.page
    need_codecs(page)
    if len(header.pages) > 1:
        return np.stack([header.pages[band].asarray(maxworkers=1) for band in header.bands], -1), None
    values = page.asarray(maxworkers=1)
    if values.ndim == 2:
        values = values[..., None]
    elif int(page.planarconfig) == 2:
        values = np.moveaxis(values, 0, -1)
    valid = None if header.alpha is None else values[..., header.alpha, None] > 0
    return values[..., list(header.bands)], valid


def _by_rasterio(path: Stored, header: TiffHeader) -> tuple[NDArray[Any], Any]:
    """Through GDAL, to which pages beyond the first are other images."""
    numbers = [band + 1 for band in header.bands]
    with gdal(), open_by_gdal(path, header) as image:
        values = np.moveaxis(image.read(numbers), 0, -1)
        valid = np.moveaxis(image.read_masks(numbers), 0, -1) > 0
    return values, valid


def by_gdal(header: TiffHeader) -> bool:
    """Whether rasterio is to read a file: a georeferenced one, of one page, where it is installed."""
    known = any(tag in header.page.tags for tag in GEOREFERENCED) and len(header.pages) == 1
    return known and importlib.util.find_spec("rasterio") is not None


def gdal(**more: Any) -> Any:
    """The settings that rasterio reads with: one thread, no files beside, and ``more``."""
    rasterio = need("rasterio", "a georeferenced TIFF")
    for name in ("rasterio", "rasterio._env", "rasterio._err"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return rasterio.Env(GDAL_NUM_THREADS="1", GDAL_PAM_ENABLED="NO", **more)


def open_by_gdal(path: Stored, header: TiffHeader) -> Any:
    """rasterio's dataset of a file, to be closed; UnreadableImageError if its size is not the header's."""
    file = os.fspath(path.absolute()) if isinstance(path, Path) else path.open()
    image = need("rasterio", "a georeferenced TIFF").open(file, driver="GTiff")
    if (image.height, image.width) != (header.page.imagelength, header.page.imagewidth):
        image.close()
        raise UnreadableImageError("its header is read in two ways")
    return image


def _upright(raster: Raster, orientation: int) -> Raster:
    """What a file of that EXIF orientation shows."""
    turned = {
        2: lambda v: v[:, ::-1],
        3: lambda v: v[::-1, ::-1],
        4: lambda v: v[::-1],
        5: lambda v: v.swapaxes(0, 1),
        6: lambda v: v.swapaxes(0, 1)[:, ::-1],
        7: lambda v: v.swapaxes(0, 1)[::-1, ::-1],
        8: lambda v: v.swapaxes(0, 1)[::-1],
    }.get(orientation)
    if turned is None:
        return raster
    return Raster(turned(raster.values), None if raster.valid is None else turned(raster.valid))


def tag_of(page: Any, code: int, default: Any) -> Any:
    """The value of a tag, of several the first."""
    tag = page.tags.get(code)
    value = default if tag is None else tag.value
    return value[0] if isinstance(value, tuple | list) and value else value


def _alpha(page: Any) -> int | None:
    """The number of the last band, from 0, if the file says that it is an alpha band."""
    tag = page.tags.get(EXTRA_SAMPLES)
    kinds = () if tag is None else tag.value if isinstance(tag.value, tuple) else (tag.value,)
    return int(page.samplesperpixel) - 1 if kinds and int(kinds[-1]) in ALPHA else None


def _no_data(page: Any) -> float | None:
    text = tag_of(page, GDAL_NO_DATA, None)
    if text is None:
        return None
    try:
        return float(str(text).strip().strip("\0").replace(",", "."))
    except ValueError:
        raise UnreadableImageError(f"its no-data value is no number: {one_line(text):.40}") from None

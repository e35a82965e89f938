"""Image files in the type and the units that they have, and whether a set of them wants to be read so."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from convnextv2.data.decoding import NATIVE, USUAL, UnreadableImageError, Wanted, open_image, reasons
from convnextv2.data.dicom import dicom_bands, dicom_pixels, is_dicom, load_dicom
from convnextv2.data.encoded import Stored, openable
from convnextv2.data.rasters import Raster, chosen_bands, raster_of
from convnextv2.data.tiff import is_tiff, load_tiff, need, tiff_bands, tiff_pixels

SAMPLE = 64
"""Files of a set whose headers say what the set is."""
BITS_PER_SAMPLE = 258
PNG, ZIP = b"\x89PNG\r\n\x1a\n", b"PK\x03\x04"
START = 132


def _start(path: Stored) -> bytes:
    with path.open("rb") as file:
        return file.read(START)


def is_deep(path: Stored) -> bool | None:
    """Whether a file has more than 8 bits a value, or is of a format of measurements; None if it is no image."""
    try:
        start, suffix = _start(path), path.suffix.lower()
        if start[:8] == PNG:
            return start[24:25] == b"\x10"
        if is_dicom(start) or (start[:4] == ZIP and suffix == ".npz"):
            return True
        if suffix == ".npy":
            with path.open("rb") as file:
                return array_header(file)[2] != np.uint8
        try:
            with Image.open(openable(path)) as image:
                tags: Any = getattr(image, "tag_v2", {})  # of a TIFF, whose mode tells little
                return image.mode[0] in "IF" or max(tags.get(BITS_PER_SAMPLE, (1,))) > 8
        except Image.UnidentifiedImageError:
            return True if is_tiff(start) else None
    except Exception:  # damaged files make decoders raise nearly anything; the scan itself says what is wrong
        return None


def settled(wanted: Wanted, paths: Sequence[Stored]) -> Wanted:
    """``wanted`` with ``pixels`` decided: native if most of the images are deep, by :data:`SAMPLE` of their headers."""
    if wanted.pixels != "auto":
        return wanted
    if wanted.window is not None or any(getattr(wanted, name) != getattr(USUAL, name) for name in NATIVE):
        return replace(wanted, pixels="native")
    chosen = {math.floor(number * len(paths) / SAMPLE) for number in range(SAMPLE)} if paths else set[int]()
    deep = [found for found in (is_deep(paths[number]) for number in sorted(chosen)) if found is not None]
    return replace(wanted, pixels="native" if 2 * sum(deep) > len(deep) else "photo")


def band_count(path: Stored) -> int | None:
    """Bands of an image by its header, those that say what is data left out; None where it cannot be read."""
    try:
        with reasons(path=path):
            start, suffix = _start(path), path.suffix.lower()
            if is_dicom(start):
                return dicom_bands(path)
            if is_tiff(start):
                return tiff_bands(path)
            if suffix in (".npy", ".npz"):
                stored = _stored_shape(path)
                return 1 if len(stored) == 2 else min(stored[0], stored[2])
            with open_image(path, USUAL) as image:
                return _band_count(image)
    except UnreadableImageError:
        return None


def _stored_shape(path: Stored) -> tuple[int, ...]:
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:
            stored = array_header(file)[0]
    else:
        with zipfile.ZipFile(openable(path)) as archive, archive.open(_npz_member(archive)) as member:
            stored = array_header(member)[0]
    if len(stored) not in (2, 3) or min(stored) < 1:
        raise UnreadableImageError(f"has the shape {stored}")
    return stored


def native_pixels(path: Stored, in_chans: int, wanted: Wanted) -> int:
    """Width × height by the header; UnreadableImageError if the file cannot be what is wanted."""
    with reasons(path=path):
        start, suffix = _start(path), path.suffix.lower()
        if is_dicom(start):  # first of all: one may begin as a TIFF, too
            return dicom_pixels(path, in_chans, wanted)
        if is_tiff(start):
            return tiff_pixels(path, in_chans, wanted)
        if suffix == ".npz":
            return math.prod(_npz_shape(path, in_chans, wanted)[:2])
        if suffix == ".npy":
            return math.prod(_npy_sides(path, in_chans, wanted))
        with open_image(path, wanted) as image:
            chosen_bands(_band_count(image), in_chans, wanted)
            return image.width * image.height


def load_native(path: Stored, in_chans: int, wanted: Wanted) -> Raster:
    """Decode an image file; UnreadableImageError, with the reason, if that is not possible.

    Args:
        path: a TIFF, a DICOM file, a PNG, a ``.npy`` or ``.npz`` array ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``, or
            a photograph, whose 8 bits are taken as they are.
        in_chans: channels wanted.
        wanted: what else is wanted.
    """
    with reasons(path=path):
        start, suffix = _start(path), path.suffix.lower()
        if is_dicom(start):
            return load_dicom(path, in_chans, wanted)
        if is_tiff(start):
            return load_tiff(path, in_chans, wanted)
        if suffix == ".npz":
            return _load_npz(path, in_chans, wanted)
        if suffix == ".npy":
            return _load_npy(path, in_chans, wanted)
        return _load_picture(path, start, in_chans, wanted)


def _band_count(image: Image.Image) -> int:
    """Bands without alpha, which says what is data."""
    bands = image.getbands()
    return 3 if image.mode == "P" else len(bands) - (bands[-1] in ("A", "a"))


def _load_picture(path: Stored, start: bytes, in_chans: int, wanted: Wanted) -> Raster:
    with open_image(path, wanted) as image:
        chosen = chosen_bands(_band_count(image), in_chans, wanted)
        wide = (start[:8] == PNG and start[24:25] == b"\x10") or image.format == "JPEG2000"
        if wide and len(image.getbands()) > 1:  # of which Pillow keeps 8 bits
            codecs = need("imagecodecs", "colour of 16 bits")
            data = path.read_bytes()
            if image.format == "PNG":
                _check_png(data)
            whole = np.atleast_3d((codecs.png_decode if image.format == "PNG" else codecs.jpeg2k_decode)(data))
        else:
            if image.mode == "P":
                image = image.convert("RGBA" if image.has_transparency_data else "RGB")
            shown = ImageOps.exif_transpose(image)
            whole = np.atleast_3d(np.asarray(shown))
            if shown.mode == "I" and image.format in ("PNG", "PPM"):  # they hold 16 bits, decoded into 32
                whole = whole.astype(np.uint16)
        alpha = whole[..., -1:] > 0 if whole.shape[2] in (2, 4) and image.mode not in ("CMYK",) else None
        if alpha is not None and max(chosen) == whole.shape[2] - 1:
            alpha = None
        return raster_of(whole[..., chosen], in_chans, wanted, valid=alpha)


def _check_png(data: bytes) -> None:
    """Raise UnreadableImageError for a PNG that is damaged: the decoder only warns of some of that."""
    place, kind = len(PNG), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, place)
        (said,) = struct.unpack_from(">I", data, place + 8 + length)
        if said != zlib.crc32(memoryview(data)[place + 4 : place + 8 + length]):
            raise UnreadableImageError(f"damaged: a checksum of {kind!r} is wrong")
        place += 12 + length


def array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and type, of an ``.npy`` file from its beginning."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def array_sides(stored: tuple[int, ...], in_chans: int, wanted: Wanted) -> tuple[int, int, int, bool]:
    """(height, width, bands, whether these come first) of an array; UnreadableImageError if it is no such image."""
    if len(stored) not in (2, 3) or min(stored) < 1:
        raise UnreadableImageError(f"has the shape {stored}, expected [H, W], [H, W, C] or [C, H, W]")
    if len(stored) == 2:
        return stored[0], stored[1], 1, False
    for count in (in_chans, 1, 3) if in_chans in (1, 3) else (in_chans,):
        if wanted.bands is None and count in (stored[2], stored[0]):
            return (*stored, False) if stored[2] == count else (stored[1], stored[2], stored[0], True)  # type: ignore[return-value]
    if wanted.bands is None:
        raise UnreadableImageError(f"has the shape {stored}, expected {in_chans} channels first or last")
    first = stored[0] < stored[2]  # with `bands` named, of any number: the shorter end
    return (stored[1], stored[2], stored[0], True) if first else (*stored, False)  # type: ignore[return-value]


def _npy_sides(path: Stored, in_chans: int, wanted: Wanted) -> tuple[int, int]:
    with path.open("rb") as file:
        stored, _, dtype = array_header(file)
        there = path.stat().st_size - file.tell()
    return _checked(stored, dtype, there, in_chans, wanted)


def _checked(
    stored: tuple[int, ...], dtype: np.dtype[Any], there: int, in_chans: int, wanted: Wanted
) -> tuple[int, int]:
    """(H, W) of an array of so many bytes; UnreadableImageError if it is too large, cut, or not what is wanted."""
    height, width, bands, _ = array_sides(stored, in_chans, wanted)
    if dtype.kind not in "biuf":
        raise UnreadableImageError(f"pixels of type {dtype} are no real numbers")
    chosen_bands(bands, in_chans, wanted)
    wanted.check_values(width, height, bands)
    if there < (expected := math.prod(stored) * dtype.itemsize):
        raise UnreadableImageError(f"truncated, {there} of {expected} bytes")
    return height, width


def _load_npy(path: Stored, in_chans: int, wanted: Wanted) -> Raster:
    _npy_sides(path, in_chans, wanted)
    with path.open("rb") as file:
        return _raster_of_array(np.lib.format.read_array(file, allow_pickle=False), in_chans, wanted)


def _raster_of_array(values: NDArray[Any], in_chans: int, wanted: Wanted) -> Raster:
    _, _, bands, first = array_sides(values.shape, in_chans, wanted)
    values = np.moveaxis(values, 0, -1) if first else values.reshape(*values.shape[:2], bands)
    return raster_of(values[..., chosen_bands(bands, in_chans, wanted)], in_chans, wanted)


def _npz_member(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
    if len(members) != 1:
        raise UnreadableImageError(f"holds {len(members)} arrays, expected one")
    return members[0]


def _npz_shape(path: Stored, in_chans: int, wanted: Wanted) -> tuple[int, ...]:
    with zipfile.ZipFile(openable(path)) as archive, archive.open(_npz_member(archive)) as file:
        stored, _, dtype = array_header(file)
        return _checked(stored, dtype, _npz_member(archive).file_size, in_chans, wanted)


def _load_npz(path: Stored, in_chans: int, wanted: Wanted) -> Raster:
    _npz_shape(path, in_chans, wanted)
    with (
        zipfile.ZipFile(openable(path)) as archive,
        archive.open(_npz_member(archive)) as file,
    ):  # read as far as its shape says
        return _raster_of_array(np.lib.format.read_array(file, allow_pickle=False), in_chans, wanted)

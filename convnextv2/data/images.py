"""One image file to pixels: every mode, bit depth and orientation, or a reason why not.

Conversions, and why they are what they are:

- Transparency (RGBA, LA, a palette or a colour with transparency) is composited on white, the page for which icons
  and cut-outs are drawn. The colour stored under a transparent pixel is arbitrary, so dropping alpha would show it.
- 16-bit images are scaled by 255/65535; clipping would turn them white.
- 32-bit integers and floats declare no range. Values within [0, 1], [0, 255] or [0, 65535] are taken to have that
  range, the smallest that fits; others are stretched from their minimum to their maximum.
- The orientation that a camera wrote into EXIF is applied.
- CMYK, YCbCr and palettes become RGB; of an animation the first frame is taken.
"""

from __future__ import annotations

import contextlib
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from convnextv2.data.bands import Pixels, Values, bands, on_white, open_array, value_range
from convnextv2.data.decoding import FORMATS, USUAL, UnreadableImageError, Wanted, open_image, reasons
from convnextv2.data.encoded import Stored
from convnextv2.data.native import load_native, native_pixels
from convnextv2.data.rasters import Decoded
from convnextv2.data.scenes import scene_pixels

LARGE = 2**22
"""Pixels of an image that is not decoded beside others when a folder is scanned."""


def has_image_suffix(path: Path) -> bool:
    """Whether the name ends like that of an image that can be read."""
    Image.init()
    suffix = path.suffix.lower()
    return suffix in (".npy", ".npz", ".dcm") or Image.EXTENSION.get(suffix) in FORMATS


def why_unusable(path: Stored, in_chans: int, full: bool, wanted: Wanted = USUAL, alone: Any = None) -> str | None:
    """The reason why a file is no usable image, or None.

    What comes before the pixels is read, in about a tenth of a millisecond; ``full`` decodes it too, the large ones
    under the lock ``alone``, where there is one: threads would otherwise hold one each.
    """
    try:
        if wanted.native or wanted.window:
            pixels = (scene_pixels if wanted.window else native_pixels)(path, in_chans, wanted)  # type: ignore[arg-type]  # windows are of files
        elif path.suffix.lower() == ".npy":
            pixels = math.prod(open_array(path, in_chans, wanted).shape)
        else:
            with open_image(path, wanted) as image:
                pixels = image.width * image.height
        if full and not wanted.window:
            with alone if alone and pixels > LARGE else contextlib.nullcontext():
                load_image(path, in_chans, wanted)
    except UnreadableImageError as error:
        return str(error)
    return None


def load_image(path: Stored, in_chans: int, wanted: Wanted = USUAL) -> Decoded:
    """Decode an image file; UnreadableImageError, with the reason, if that is not possible.

    Args:
        path: an image in one of :data:`FORMATS`, or a ``.npy`` array ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``.
        in_chans: channels wanted.
        wanted: what else is wanted.

    Returns:
        For 1 and 3 channels an RGB image (gray ones have three equal channels). For any other number an array
        ``[H, W, in_chans]``, float32, integers scaled to [0, 1] by the largest value of their type and floats as
        stored; it comes from a ``.npy`` file, a TIFF of ``in_chans`` gray pages, or an image of as many bands.
    """
    if wanted.native:
        return load_native(path, in_chans, wanted)
    with reasons():
        if path.suffix.lower() == ".npy":
            array = open_array(path, in_chans, wanted)
            if in_chans not in (1, 3):
                return array.upright(_unit_range(array))
            values = array.upright(to_bytes(array))
            image, exif = Image.fromarray(values if values.shape[-1] == 3 else values[..., 0]).convert("RGB"), b""
        elif in_chans not in (1, 3):
            return _many_channels(path, in_chans, wanted)
        else:
            image, exif = _rgb(path, wanted)  # by now what was decoded has been let go
        if exif:
            image.info = {"exif": exif}
            ImageOps.exif_transpose(image, in_place=True)
        return image.convert("L").convert("RGB") if in_chans == 1 else image


def to_bytes(values: Values) -> NDArray[np.uint8]:
    """Pixel values of any type as 8 bits, by the range rules at the top of this module; UnreadableImageError if they
    are not finite, or no real numbers."""
    if values.dtype == np.uint8:
        return values[: values.shape[0]]
    if values.dtype.kind not in "biuf":
        raise UnreadableImageError(f"pixels of type {values.dtype} are no real numbers")
    result = np.empty(values.shape, np.uint8)
    with np.errstate(all="ignore"):  # what is not finite is told, not warned of
        low, high = 0.0, 65535.0
        if values.dtype.kind != "u" or values.dtype.itemsize != 2:  # of either byte order
            low, high = value_range(values)
            if low >= 0:
                limits = (255.0, 65535.0) if values.dtype.kind in "iu" else (1.0, 255.0, 65535.0)
                low, high = next(((0.0, limit) for limit in limits if high <= limit), (low, high))
        factor = 1.0
        if high > low and not 2.0**-900 < high - low < math.inf:  # the range, or its reciprocal, is not finite
            factor = 2.0**512 if high - low < 1 else 0.25
        low, span = low * factor, high * factor - low * factor
        for rows in bands(values.shape):
            wide = values[rows].astype(np.float64) * factor
            result[rows] = np.rint((wide - low) * (255.0 / span if span else 0.0)).astype(np.uint8)
    return result


def _unit_range(values: Values) -> NDArray[np.float32]:
    """Integers by the largest value of their type, floats as they are; UnreadableImageError if not finite."""
    scale = np.float32(1.0 / np.iinfo(values.dtype.name).max if values.dtype.kind in "iu" else 1.0)
    result = np.empty(values.shape, np.float32)
    with np.errstate(all="ignore"):
        for rows in bands(values.shape):
            result[rows] = values[rows].astype(np.float32) * scale
            if not np.isfinite(result[rows]).all():
                raise UnreadableImageError("pixels hold NaN or infinite values")
    return result


def _rgb(path: Stored, wanted: Wanted) -> tuple[Image.Image, bytes]:
    """The image as it is stored, and the orientation that it is to be shown in."""
    with open_image(path, wanted) as image:
        image.load()
        exif = _orientation(image)
        if image.mode.startswith("I") or image.mode == "F":
            narrow = image.mode == "I" and image.format in ("PNG", "PPM")  # they hold 16 bits, decoded into 32
            image = Image.fromarray(to_bytes(Pixels(image, np.uint16 if narrow else None)))
        elif image.has_transparency_data:
            return on_white(image), exif
        return image.convert("RGB"), exif


def _orientation(image: Image.Image) -> bytes:
    """EXIF metadata that holds the orientation alone: the rest may be damaged around good pixels."""
    exif = Image.Exif()
    try:
        exif[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
        return exif.tobytes() if exif[ExifTags.Base.Orientation] != 1 else b""
    except (SyntaxError, ValueError, OSError, KeyError, TypeError, struct.error):
        return b""


def _many_channels(path: Stored, in_chans: int, wanted: Wanted) -> NDArray[np.float32]:
    with open_image(path, wanted) as image:
        bands, mode, pages = len(image.getbands()), image.mode, 1
        if bands == 1:
            with contextlib.suppress(EOFError):
                while pages <= in_chans:  # and no further: there may be a million
                    image.seek(pages)
                    wanted.check(*image.size)
                    pages += 1
        if bands == 1 and pages == in_chans:
            return _pages(image, in_chans)
        if bands != in_chans or mode == "CMYK":
            counted = f"{pages} page(s)" if pages <= in_chans else f"more than {in_chans} pages"
            raise UnreadableImageError(f"has {bands} bands ({mode}) and {counted}, expected {in_chans} channels")
        image.load()
        return _unit_range(Pixels(image))


def _pages(image: Image.Image, count: int) -> NDArray[np.float32]:
    pages = list[NDArray[np.generic]]()
    for number in range(count):
        image.seek(number)
        pages.append(np.asarray(image))
    if len({page.shape for page in pages}) > 1:
        raise UnreadableImageError("its pages differ in size")
    dtype = np.result_type(*pages)
    result = np.empty((*pages[0].shape, count), np.float32)
    for number, page in enumerate(pages):
        result[..., number] = _unit_range(page.astype(dtype, copy=False))
    return result

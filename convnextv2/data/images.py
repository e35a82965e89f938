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
import ctypes
import logging
import math
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, ImageSequence

from convnextv2.files import one_line

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read; JPEG includes MPO. Those that run a program (EPS) or have no signature (TGA, PCD) are not."""

# What is said about damaged files beside the errors that are raised names no file.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=SyntaxWarning, module="<unknown>")  # the header of a .npy file is evaluated
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(OSError, AttributeError):  # a Pillow that hides its libtiff
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class UnreadableImageError(ValueError):
    """The file is no image, or is damaged; the message is the reason, without the file's name, in one line."""

    def __init__(self, reason: object) -> None:
        super().__init__(one_line(reason))


def has_image_suffix(path: Path) -> bool:
    """Whether the name ends like that of an image that can be read."""
    Image.init()
    return path.suffix.lower() == ".npy" or Image.EXTENSION.get(path.suffix.lower()) in FORMATS


def why_unusable(path: Path, in_chans: int, full: bool) -> str | None:
    """The reason why a file is no usable image, or None.

    ``full`` decodes it; else what comes before the pixels is read, in about a tenth of a millisecond.
    """
    try:
        if full:
            load_image(path, in_chans)
        elif path.suffix.lower() == ".npy":
            _load_array(path, mmap=True)
        else:
            _open(path).close()
    except UnreadableImageError as error:
        return str(error)
    return None


def load_image(path: Path, in_chans: int) -> Image.Image | NDArray[np.float32]:
    """Decode an image file.

    Args:
        path: an image in one of :data:`FORMATS`, or a ``.npy`` array ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``.
        in_chans: channels wanted.

    Returns:
        For 1 and 3 channels an RGB image (gray ones have three equal channels). For any other number an array
        ``[H, W, in_chans]``, float32, integers scaled to [0, 1] by the largest value of their type and floats as
        stored; it comes from a ``.npy`` file, a TIFF of ``in_chans`` gray pages, or an image of as many bands.

    Raises:
        UnreadableImageError: with the reason.
    """
    if path.suffix.lower() == ".npy":
        array = _channels_last(_load_array(path), in_chans)
        if in_chans not in (1, 3):
            return _unit_range(array)
        rgb = Image.fromarray(np.ascontiguousarray(np.broadcast_to(to_bytes(array), (*array.shape[:2], 3))))
        return rgb if in_chans == 3 else rgb.convert("L").convert("RGB")
    with _open(path) as image, _reasons():
        if in_chans not in (1, 3):
            return _bands(image, in_chans)
        image.load()
        rgb = _to_rgb(image)
        return rgb if in_chans == 3 else rgb.convert("L").convert("RGB")


def to_bytes(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Pixel values of any type as 8 bits, by the range rules at the top of this module.

    Raises:
        UnreadableImageError: if values are not finite, or no real numbers.
    """
    if values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    if values.dtype.kind not in "biuf":
        raise UnreadableImageError(f"pixels of type {values.dtype} are no real numbers")
    with np.errstate(invalid="ignore"):  # in the conversion of a signalling NaN
        wide = values.astype(np.float64)
    if not np.isfinite(wide).all():
        raise UnreadableImageError("pixels hold NaN or infinite values")
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:  # of either byte order
        low, high = 0.0, 65535.0
    else:
        low, high = float(wide.min()), float(wide.max())
        if low >= 0:
            limits = (255.0, 65535.0) if values.dtype.kind in "iu" else (1.0, 255.0, 65535.0)
            low, high = next(((0.0, limit) for limit in limits if high <= limit), (low, high))
    if high > low and not 2.0**-900 < high - low < math.inf:  # the range, or its reciprocal, is not finite
        factor = 2.0**512 if high - low < 1 else 0.25
        wide, low, high = wide * factor, low * factor, high * factor
    span = high - low
    return np.rint((wide - low) * (255.0 / span if span else 0.0)).astype(np.uint8)


@contextlib.contextmanager
def _reasons(problem: str = "", path: Path | None = None) -> Iterator[None]:
    """Any error as an UnreadableImageError: damaged files make the decoders raise nearly anything."""
    try:
        if path is not None and path.stat().st_size == 0:
            raise UnreadableImageError("empty file")
        yield
    except UnreadableImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImageError(f"{problem}not an image, or a format that is not read") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise UnreadableImageError(f"{problem}{reason}") from error


def _open(path: Path) -> Image.Image:
    with _reasons(path=path):
        image = Image.open(path, formats=FORMATS)
    if image.format == "TIFF":
        image.filename = ""  # else Pillow maps uncompressed files by the size of the turned image: scrambled rows
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    exif = _orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "I" and image.format in ("PNG", "PPM"):
            values = values.astype(np.uint16)  # these formats hold 16 bits, decoded into 32
        image = Image.fromarray(to_bytes(values))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if exif:
        image.info = {"exif": exif}
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _orientation(image: Image.Image) -> bytes:
    """EXIF metadata that holds the orientation alone: the rest may be damaged around good pixels."""
    exif = Image.Exif()
    try:
        exif[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
        return exif.tobytes() if exif[ExifTags.Base.Orientation] != 1 else b""
    except (SyntaxError, ValueError, OSError, KeyError, TypeError, struct.error):
        return b""


def _bands(image: Image.Image, in_chans: int) -> NDArray[np.float32]:
    frames = getattr(image, "n_frames", 1)
    if frames == in_chans and len(image.getbands()) == 1:
        pages = [np.asarray(page) for page in ImageSequence.Iterator(image)]
        if len({page.shape for page in pages}) > 1:
            raise UnreadableImageError("its pages differ in size")
        return _unit_range(np.stack(pages, axis=-1))
    if len(image.getbands()) != in_chans or image.mode == "CMYK":
        raise UnreadableImageError(
            f"has {len(image.getbands())} bands ({image.mode}) and {frames} page(s), expected {in_chans} channels"
        )
    return _unit_range(np.asarray(image))


def _load_array(path: Path, mmap: bool = False) -> NDArray[np.generic]:
    with (
        _reasons("not a readable .npy array: ", path),
        np.errstate(all="ignore"),
    ):  # or its header asks for more memory than there is
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    numbers = isinstance(array, np.ndarray) and array.dtype.kind in "biuf"
    if not numbers or array.ndim not in (2, 3) or 0 in array.shape:
        raise UnreadableImageError("expected an array of numbers [H, W], [H, W, C] or [C, H, W]")
    return array


def _channels_last(array: NDArray[np.generic], in_chans: int) -> NDArray[np.generic]:
    """``[H, W, in_chans]`` from an array of either order; one channel stands in for three."""
    if array.ndim == 2:
        array = array[..., None]
    for channels in (in_chans, 1, 3) if in_chans in (1, 3) else (in_chans,):
        if array.shape[-1] == channels:
            return array
        if array.shape[0] == channels:
            return np.moveaxis(array, 0, -1)
    raise UnreadableImageError(f"has the shape {array.shape}, expected {in_chans} channels first or last")


def _unit_range(array: NDArray[np.generic]) -> NDArray[np.float32]:
    scale = 1.0 / np.iinfo(array.dtype.name).max if array.dtype.kind in "iu" else 1.0
    with np.errstate(all="ignore"):  # to infinity, which is refused
        values = array.astype(np.float32) * np.float32(scale)
    if not np.isfinite(values).all():
        raise UnreadableImageError("pixels hold NaN or infinite values")
    return values

"""What is wanted of image files; opening one, to be decoded within bounds, or the reason why it cannot be."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import logging
import math
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile, JpegImagePlugin

from convnextv2.data.encoded import Stored, openable
from convnextv2.messages import one_line

Size = tuple[int, int]
"""(H, W) in pixels."""
MAX_PIXELS = 2**26
"""Width × height of an image file that is decoded, unless more is asked for: with it a process takes about 1.5 GB."""

PIXELS, CROPS = ("auto", "photo", "native"), ("area", "native")
RESIZERS = ("pillow", "torchvision")
"""``torchvision`` is faster and keeps weights in 16 bits: one value in some hundreds differs, by 1 or 2 of 255."""
NATIVE = ("bands", "no_data", "crop", "value_range")
"""What is wanted of native images only."""
VALUES_A_PIXEL = 16
"""A file of more bands is read up to as many values as ``max_pixels`` pixels with this many would have."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read; JPEG includes MPO. Those that run a program (EPS) or have no signature (TGA, PCD) are not."""

# What is said about damaged files beside the errors that are raised names no file.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=SyntaxWarning, module="<unknown>")  # the header of a .npy file is evaluated
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(OSError, AttributeError):  # a Pillow that hides its libtiff
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


@dataclass(frozen=True)
class Wanted:
    """What is wanted of image files, apart from the number of their channels.

    Args:
        max_pixels: largest width × height. Larger JPEG and JPEG 2000 files are decoded at the largest of their reduced
            sizes (a half, a quarter, …) that keeps to it, where that takes little memory; all others are unreadable.
        least_side: JPEG files are decoded at the smallest of their reduced sizes (to an eighth) whose shorter side has
            this many pixels; None for never.
        pixels: one of :data:`PIXELS`: ``photo`` reads 8 bits a value, ``native`` the type and the units of the file,
            and ``auto`` is ``native`` for a set of images of which most have more than 8 bits.
        bands: numbers, from 1, of the bands of a file that are the channels, in this order; None for all.
        no_data: the value that stands for no data, beside what a file itself says.
        crop: of native images, one of :data:`CROPS`: ``area`` brings them to the size of the network, ``native`` cuts
            them to it, at the scale of their pixels.
        value_range: least and greatest value that native images can have, in their units; None for what is measured.
        ranges: the same of each band, as it was measured before.
        window: (H, W) in pixels of the parts that images are read in, never whole; None for whole images.
    """

    max_pixels: int = MAX_PIXELS
    least_side: int | None = None
    pixels: str = "auto"
    bands: tuple[int, ...] | None = None
    no_data: float | None = None
    crop: str = "area"
    value_range: tuple[float, float] | None = None
    ranges: tuple[tuple[float, float], ...] | None = None
    window: Size | None = None

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, got {self.max_pixels}")
        if self.pixels not in PIXELS:
            raise ValueError(f"`pixels` must be one of {', '.join(PIXELS)}, got {self.pixels!r}")
        if self.crop not in CROPS:
            raise ValueError(f"`crop` must be one of {', '.join(CROPS)}, got {self.crop!r}")
        if self.value_range is not None and not -math.inf < self.value_range[0] < self.value_range[1] < math.inf:
            raise ValueError(f"`value_range` must be two numbers, the lower one first, got {self.value_range}")
        if self.window is not None and not (len(self.window) == 2 and min(self.window) >= 1):
            raise ValueError(f"`window` must be a height and a width in pixels, got {self.window}")
        if self.bands is not None and not (self.bands and all(band >= 1 for band in self.bands)):
            raise ValueError(f"`bands` are numbers from 1 on, as in 4,3,2, got {self.shown_bands!r}")
        if self.pixels == "photo" and (
            set_ := [name for name in NATIVE if getattr(self, name) != getattr(USUAL, name)]
        ):
            raise ValueError(f"`{set_[0]}` is of `pixels` native; leave it out with `pixels` photo")

    @property
    def native(self) -> bool:
        """Whether images are read in the type and the units of their file."""
        return self.pixels == "native"

    @property
    def shown_bands(self) -> str:
        """``4,3,2``."""
        return ",".join(map(str, self.bands or ()))

    def __str__(self) -> str:
        unusual = [item.name for item in fields(self) if getattr(self, item.name) != item.default]
        return f"Wanted({', '.join(f'{name}={getattr(self, name)!r}' for name in unusual)})"

    def check(self, width: int, height: int) -> None:
        """Raise UnreadableImageError for an image that is too large."""
        if width * height > self.max_pixels:
            raise self.too_large(f"{width}×{height} pixels")

    def check_values(self, width: int, height: int, bands: int) -> None:
        """Raise UnreadableImageError for an image that is too large, or has too many bands for its size."""
        self.check(width, height)
        if width * height * bands > VALUES_A_PIXEL * self.max_pixels:
            raise self.too_large(f"{width}×{height} pixels of {bands} bands")

    def too_large(self, size: str) -> UnreadableImageError:
        """The reason why an image of that size is not read."""
        bound = f"`max_pixels` {self.max_pixels} (width × height)"
        parts = "" if self.window else "; `window` reads a TIFF, .npy or .zarr in parts"
        return UnreadableImageError(f"{size}, more than {bound}: a decompression bomb, or to be asked for{parts}")

    def taken_by(self, function: Callable[..., Any]) -> dict[str, Wanted]:
        """This as the argument ``wanted`` of a function, which it may lack where nothing unusual is wanted."""
        taken = inspect.signature(function).parameters.values()
        if any(one.name == "wanted" or one.kind is one.VAR_KEYWORD for one in taken):
            return {"wanted": self}
        if self != USUAL and self != replace(USUAL, pixels="photo"):
            name = getattr(function, "__qualname__", function)
            raise ValueError(f"{self} cannot be told to {name}, which takes no 'wanted': see docs/data.md")
        return {}


USUAL = Wanted()


class UnreadableImageError(ValueError):
    """The file is no image, or is damaged; the message is the reason, without the file's name, in one line."""

    def __init__(self, reason: object) -> None:
        super().__init__(one_line(reason))


@contextlib.contextmanager
def reasons(problem: str = "", path: Stored | None = None) -> Iterator[None]:
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
        raise UnreadableImageError(f"{problem}{reason:.200}") from error


def is_zarr(path: Stored) -> bool:
    """Whether a folder is a zarr array, or a group of them, by its name and what lies in it."""
    if not isinstance(path, Path):
        return False
    names = ("zarr.json", ".zarray", ".zgroup")
    inside = path.suffix.lower() == ".zarr" or path.parent.suffix.lower() == ".zarr"
    return inside and any((path / name).is_file() for name in names)


def open_image(path: Stored, wanted: Wanted) -> ImageFile.ImageFile:
    """The file, its header read, to be decoded at a size that is not too large."""
    with reasons(path=path):
        if is_zarr(path):
            raise UnreadableImageError("is a zarr array, which is read in parts: say `window`")
        if Image.MAX_IMAGE_PIXELS is not None and wanted.max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = wanted.max_pixels  # else Pillow refuses what was asked for
        image = _identify(path, wanted)
        try:
            _reduce(image, path, wanted)
            wanted.check(*image.size)
        except BaseException:
            image.close()
            raise
    if image.format == "TIFF":
        image.filename = ""  # else Pillow maps uncompressed files by the size of the turned image: scrambled rows
    return image


def _identify(path: Stored, wanted: Wanted) -> ImageFile.ImageFile:
    """As ``Image.open``, which would not open a JPEG file that is large, but can be decoded at another size."""
    Image.init()
    with path.open("rb") as file:
        start = file.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or accept is None or accept(start) is not True:
            continue
        try:
            return factory(openable(path), "")  # type: ignore[arg-type]  # it opens and closes a path itself
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # another format's
        except Image.DecompressionBombError as error:
            raise wanted.too_large(str(error).partition(" exceeds")[0]) from error
    raise UnreadableImageError("not an image, or a format that is not read")


def _reduce(image: ImageFile.ImageFile, path: Stored, wanted: Wanted) -> None:
    """Let an image that is too large be decoded at the largest of its reduced sizes that is not, if it has one."""
    width, height = image.size
    for halvings in range(1, (0 if width * height <= wanted.max_pixels else _halvings(image, path, wanted)) + 1):
        scale = 1 << halvings
        size = math.ceil(width / scale), math.ceil(height / scale)
        if size[0] * size[1] <= wanted.max_pixels:
            if image.format == "JPEG2000":  # its own attribute for this, reduce, mistakes sizes that are not divisible
                codec, _, _, (kind, _, *rest) = image.tile[0]  # type: ignore[misc, str-unpack]
                image._size, image.tile = size, [(codec, (0, 0, *size), 0, (kind, halvings, *rest))]  # type: ignore[list-item]
            else:
                image.draft(None, (max(1, width // scale), max(1, height // scale)))
            return
    if wanted.least_side is not None and image.format == "JPEG" and min(width, height) >= 2 * wanted.least_side:
        scale = min(8, min(width, height) // wanted.least_side)
        image.draft(None, (width // scale, height // scale))


def _halvings(image: ImageFile.ImageFile, path: Stored, wanted: Wanted) -> int:
    """How often the sides of an image can be halved before it is decoded, without much memory for the whole."""
    pixels = image.width * image.height
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.fp is not None:
        sampled = [across * down for _, across, down, _ in image.layer]
        image.fp.seek(-6 - 2 * len(sampled), os.SEEK_CUR)  # to what was read last, the head of the first scan
        one_scan = image.fp.read(3) == struct.pack(">HB", 6 + 2 * len(sampled), len(sampled))
        kept = 0.0 if one_scan and "progressive" not in image.info else pixels * sum(sampled) / max(sampled)
        return 3 if kept <= 6 * wanted.max_pixels else 0  # coefficients of two bytes that wait for later scans
    if image.format != "JPEG2000" or pixels > 16 * wanted.max_pixels:  # its blocks are listed before they are read
        return 0
    with path.open("rb") as file:
        _, _, header = file.read(2**16).partition(b"\xff\x4f\xff\x51")
    _, _, style = header.partition(b"\xff\x52")  # marker of the coding style: length, flags, order, layers, transform
    return min(style[7], 32) if len(style) > 7 else 0

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
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile, JpegImagePlugin

from convnextv2.messages import one_line

Size = tuple[int, int]
"""(H, W) in pixels."""
MAX_PIXELS = 2**26
"""Width × height of an image file that is decoded, unless more is asked for: with it a process takes about 1.5 GB."""

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
    """

    max_pixels: int = MAX_PIXELS
    least_side: int | None = None

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, got {self.max_pixels}")

    def __str__(self) -> str:
        unusual = [item.name for item in fields(self) if getattr(self, item.name) != item.default]
        return f"Wanted({', '.join(f'{name}={getattr(self, name)!r}' for name in unusual)})"

    def check(self, width: int, height: int) -> None:
        """Raise UnreadableImageError for an image that is too large."""
        if width * height > self.max_pixels:
            raise self.too_large(f"{width}×{height} pixels")

    def too_large(self, size: str) -> UnreadableImageError:
        """The reason why an image of that size is not read."""
        bound = f"`max_pixels` {self.max_pixels} (width × height)"
        return UnreadableImageError(f"{size}, more than {bound}: a decompression bomb, or to be asked for")

    def taken_by(self, function: Callable[..., Any]) -> dict[str, Wanted]:
        """This as the argument ``wanted`` of a function, which it may lack where nothing unusual is wanted."""
        taken = inspect.signature(function).parameters.values()
        if any(one.name == "wanted" or one.kind is one.VAR_KEYWORD for one in taken):
            return {"wanted": self}
        if self != USUAL:
            name = getattr(function, "__qualname__", function)
            raise ValueError(f"{self} cannot be told to {name}, which takes no 'wanted': see docs/data.md")
        return {}


USUAL = Wanted()


class UnreadableImageError(ValueError):
    """The file is no image, or is damaged; the message is the reason, without the file's name, in one line."""

    def __init__(self, reason: object) -> None:
        super().__init__(one_line(reason))


@contextlib.contextmanager
def reasons(problem: str = "", path: Path | None = None) -> Iterator[None]:
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


def open_image(path: Path, wanted: Wanted) -> ImageFile.ImageFile:
    """The file, its header read, to be decoded at a size that is not too large."""
    with reasons(path=path):
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


def _identify(path: Path, wanted: Wanted) -> ImageFile.ImageFile:
    """As ``Image.open``, which would not open a JPEG file that is large, but can be decoded at another size."""
    Image.init()
    with path.open("rb") as file:
        start = file.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or accept is None or accept(start) is not True:
            continue
        try:
            return factory(path, "")  # type: ignore[arg-type]  # it opens and closes the file itself
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # another format's
        except Image.DecompressionBombError as error:
            raise wanted.too_large(str(error).partition(" exceeds")[0]) from error
    raise UnreadableImageError("not an image, or a format that is not read")


def _reduce(image: ImageFile.ImageFile, path: Path, wanted: Wanted) -> None:
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


def _halvings(image: ImageFile.ImageFile, path: Path, wanted: Wanted) -> int:
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

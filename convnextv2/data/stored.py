"""Pixels where they lie in files, by box: what a format gives of itself, rows that are stored as they are, and decoded
tiles that are kept for the next window."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convnextv2.data.decoding import Size, UnreadableImageError

Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels, the last two exclusive."""
SEGMENT_BYTES = 2**26
"""Of a tile, strip or chunk, decoded: a larger one would cost a window its memory and seconds."""
KEPT_BYTES = 2**26
"""Of decoded tiles that a thread keeps: neighbouring windows share them."""


@dataclass(frozen=True, eq=False)
class Stored:
    """What an image file gives.

    Args:
        size: (H, W) in pixels.
        bands: how many are read.
        cut: from a box that lies in the image to values ``[h, w, bands]``, and which are valid (None for all), to be
            broadcast.
        block: (H, W) of what is decoded together.
        no_data: the value that the file declares.
        may_lack_data: whether there can be pixels without data.
    """

    size: Size
    bands: int
    cut: Callable[[Box], tuple[NDArray[Any], Any]]
    block: Size
    no_data: float | None
    may_lack_data: bool


class OpenFile:
    """A file to read parts of, from any thread; closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self._file)
        self.size = os.fstat(self._file).st_size

    def read(self, offset: int, count: int) -> bytes:
        """So many bytes; UnreadableImageError if the file has become shorter."""
        found = os.pread(self._file, count, offset)
        while len(found) < count and (more := os.pread(self._file, count - len(found), offset + len(found))):
            found += more
        if len(found) < count:
            raise UnreadableImageError("was cut while it was read")
        return found


@dataclass(frozen=True, eq=False)
class RawRows:
    """Numbers ``[planes, H, W, inner]`` that lie in a file as they are; planes or ``inner`` are the bands.

    Args:
        offset: where they begin, in bytes.
        turned: whether they are ``[planes, W, H, inner]`` there.
    """

    file: OpenFile
    offset: int
    dtype: np.dtype[Any]
    planes: int
    size: Size
    inner: int
    turned: bool = False

    def cut(self, box: Box, bands: Sequence[int]) -> NDArray[Any]:
        """``[h, w, bands]``, these by number."""
        (top, left, bottom, right), (height, width) = box, self.size
        if self.turned:
            top, left, bottom, right, height, width = left, top, right, bottom, width, height
        pixel = self.inner * self.dtype.itemsize
        parts = []
        for plane in bands if self.planes > 1 else (0,):
            start = self.offset + plane * height * width * pixel
            places = (start + (row * width + left) * pixel for row in range(top, bottom))
            data = b"".join(self.file.read(place, (right - left) * pixel) for place in places)
            parts.append(np.frombuffer(data, self.dtype).reshape(bottom - top, right - left, self.inner))
        values = np.concatenate(parts, axis=-1) if self.planes > 1 else parts[0][..., list(bands)]
        return values.swapaxes(0, 1) if self.turned else values


class _Kept(threading.local):
    def __init__(self) -> None:
        self.segments = OrderedDict[tuple[int, int], NDArray[Any]]()
        self.bytes = 0


_kept, _numbers = _Kept(), itertools.count()


class KeptSegments:
    """Decoded tiles or strips of one file, the last ones kept, :data:`KEPT_BYTES` of all files.

    Args:
        decode: from the number of one to its pixels.
    """

    def __init__(self, decode: Callable[[int], NDArray[Any]]) -> None:
        self._decode, self._number = decode, next(_numbers)

    def __getitem__(self, index: int) -> NDArray[Any]:
        key = self._number, index
        found = _kept.segments.pop(key, None)
        if found is None:
            found = self._decode(index)
            _kept.bytes += found.nbytes
        _kept.segments[key] = found
        while _kept.bytes > KEPT_BYTES and len(_kept.segments) > 1:
            _kept.bytes -= _kept.segments.popitem(last=False)[1].nbytes
        return found

"""Decoded images in one file that is mapped into memory: built once, for all processes and all runs that want the same.

A cache is a folder ``<key>`` with ``pixels.bin`` (uint8 ``[H, W, C]`` of one image after the other), ``index.npy``
(where each begins, H, W) and ``about.json``. The key is made of everything that the pixels depend on: paths, sizes and
times of the files, channels, the bound on the shorter side, what else is wanted of files. So one that no longer fits
is never found; its folder may be deleted by hand when no run uses it. A build happens in a temporary folder under a
lock, and is renamed when it is complete: what a kill leaves is removed by the next build.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convnextv2.data.crops import picture
from convnextv2.data.decoding import UnreadableImageError
from convnextv2.data.sources import DataError, FileSource, Source, Subset
from convnextv2.files import write_json

try:
    import fcntl
except ImportError:  # on Windows, where everyone who waits would build
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
CHUNK = 256
"""Images that are decoded, side by side, before they are written."""


class CachedSource:
    """Images of a source of files from a cache; as :class:`~.sources.Source`, and :meth:`array` without a copy.

    Images that could not be decoded when the cache was built stay unreadable. Picklable; each process maps the file
    for itself.

    Args:
        folder: of the cache, complete.
        chosen: images of it, by number.
        paths: the files that they were decoded from.
    """

    def __init__(self, folder: Path, chosen: Sequence[int], paths: Sequence[Path]) -> None:
        self.folder, self._chosen, self.paths = folder, chosen, paths
        about = _about(folder)
        if about is None:
            raise DataError(f"{folder}: is no complete cache of images; delete it")
        self._channels, self._reasons = about["channels"], {int(key): text for key, text in about["unreadable"].items()}
        self._index: NDArray[np.int64] = np.load(folder / "index.npy", allow_pickle=False)
        self._bytes: NDArray[np.uint8] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}

    def __len__(self) -> int:
        return len(self._chosen)

    def array(self, index: int) -> NDArray[np.uint8]:
        """Pixels ``[H, W, C]``, not to be written to; UnreadableImageError if the file could not be decoded."""
        number = self._chosen[index]
        start, height, width = self._index[number].tolist()
        if height == 0:
            raise UnreadableImageError(self._reasons[number])
        if self._bytes is None:
            self._bytes = np.memmap(self.folder / "pixels.bin", np.uint8, "r").view(np.ndarray)
        return self._bytes[start : start + height * width * self._channels].reshape(height, width, self._channels)

    def load(self, index: int) -> Image.Image:
        """An RGB image, as every source gives it."""
        return picture(self.array(index)).convert("RGB")


def cached(source: Source, directory: str | Path, side: int, say: Callable[[str], None] = lambda line: None) -> Source:
    """``source`` from a cache in ``directory``, which is built if there is none; others who want it wait.

    Args:
        source: images in files, of 1 or 3 channels.
        side: images whose shorter side has more pixels are shrunk to that (bicubic); others are kept as they are, so
            that the pixels are those of the files.
        say: is told when a build begins.

    Raises:
        ValueError: if the images do not come from files.
        OSError: if the cache cannot be written, on a full disk too.
    """
    numbers: Sequence[int] = range(len(source))
    inner: Any = source
    while isinstance(inner, Subset):
        numbers, inner = [inner.numbers[number] for number in numbers], inner.source
    if not isinstance(inner, FileSource) or inner.in_chans not in (1, 3):
        raise ValueError("`cache` is for images in files, of 1 or 3 channels; leave it out")
    if inner.wanted.native:
        raise ValueError("`cache` keeps 8 bits a value, fewer than `pixels` native reads; leave it out")
    folder = Path(directory) / _key(inner, side)
    if _about(folder) is None:
        try:
            with alone(folder):
                if _about(folder) is None:
                    say(f"caching {len(inner)} images in {folder}")
                    _build(inner, folder, side)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "the disk is full: free some, or name another `cache` or a smaller `cache_side`"
            raise OSError(
                f"{directory}: cannot be used as `cache`: {hint if full else error.strerror or error}"
            ) from error
    return CachedSource(folder, numbers, [inner.paths[number] for number in numbers])


def _key(source: FileSource, side: int) -> str:
    wanted = {name: getattr(source.wanted, name) for name in ("max_pixels", "least_side")}  # all that photographs have
    digest = hashlib.sha256(json.dumps([FORMAT, side, source.in_chans, wanted]).encode())
    for path in source.paths:
        try:
            status = path.stat()
            seen = status.st_size, status.st_mtime_ns
        except OSError:
            seen = -1, -1
        digest.update(os.fsencode(path.absolute()) + b"\0%d %d\0" % seen)
    return digest.hexdigest()[:24]


def _about(folder: Path) -> dict[str, Any] | None:
    """What a cache says about itself, if it is there, and as large as it says."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        return about if _sizes(folder) == about["sizes"] else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: built anew, or told why it cannot be
        return None


def _sizes(folder: Path) -> list[int]:
    return [(folder / name).stat().st_size for name in ("pixels.bin", "index.npy")]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process has ``folder``, which need not be there, until the block ends; OSError if it cannot be."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets it go when the process ends, however that ends
        yield


def _build(source: FileSource, folder: Path, side: int) -> None:
    temporary = folder.with_name(f"{folder.name}.part{'' if fcntl else os.getpid()}")
    for leftover in (temporary, folder):  # of a killed build; or damaged
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        index, unreadable, start = np.zeros((len(source), 3), np.int64), dict[int, str](), 0

        def decoded(number: int) -> NDArray[np.uint8] | str:
            try:
                return _small(source.load(number), side, source.in_chans)  # type: ignore[arg-type]  # 1 or 3 channels
            except UnreadableImageError as error:
                return str(error)

        with (temporary / "pixels.bin").open("wb") as file, ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            for first in range(0, len(source), CHUNK):
                chunk = range(first, min(first + CHUNK, len(source)))
                for number, pixels in zip(chunk, pool.map(decoded, chunk), strict=True):
                    if isinstance(pixels, str):
                        unreadable[number] = pixels
                        continue
                    index[number] = start, *pixels.shape[:2]
                    start += file.write(np.ascontiguousarray(pixels).data.cast("B"))
            if not start:
                file.write(b"\0")  # an empty file cannot be mapped
            file.flush()
            os.fsync(file.fileno())
        np.save(temporary / "index.npy", index)
        about = {"sizes": _sizes(temporary), "channels": source.in_chans, "side": side, "unreadable": unreadable}
        write_json(temporary / "about.json", about)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _small(image: Image.Image, side: int, channels: int) -> NDArray[np.uint8]:
    shorter = min(image.size)
    if shorter > side:
        size = round(image.width * side / shorter), round(image.height * side / shorter)
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 2 and channels == 1 else pixels[..., :channels]

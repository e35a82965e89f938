"""What folders hold, and what an earlier start found of a large one.

Of a folder of :data:`LEAST` files or more the listing is kept in the user's cache. The next start takes it as it is, if
no folder in it has changed since, which a look at each folder tells: files that came, went or were renamed change the
time of their folder. What only a look at every file tells, such as new content, is sought by :class:`ListingCheck`
while a run trains. Headers are read of files alone that are new, have changed, or were unusable.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import struct
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convnextv2.data.decoding import is_zarr
from convnextv2.data.paths import PathList
from convnextv2.data.sources import DataError
from convnextv2.data.tar_index import cache_folder
from convnextv2.files import atomic_path

LEAST = 10_000
"""Files from which on it is worth files in the user's cache."""
SETTLED_NS = 2 * 10**9
"""A folder that changed so shortly before it was read may change again without another time."""
FORMAT = 1


@dataclass(frozen=True)
class Listing:
    """The regular files at all depths of a folder, sorted by the parts of their paths.

    Args:
        paths: the files.
        size: bytes of all.
        marks: uint64 ``[N]``: of each file's name, size and time of change.
        skipped: what was left out, relative to the folder, and why.
    """

    paths: PathList
    size: int
    marks: NDArray[np.uint64]
    skipped: tuple[tuple[str, str], ...]

    def told(self) -> list[tuple[Path, str]]:
        """What was left out, and why."""
        return [(self.paths.root / name, reason) for name, reason in self.skipped]


@dataclass
class _Walk:
    """Names and states of files, of folders, and what is left out: relative to ``root``."""

    root: Path
    files: list[tuple[str, os.stat_result]]
    folders: dict[str, os.stat_result]
    skipped: list[tuple[str, str]]


def _walk(root: Path) -> _Walk:
    """Every folder is read once: by its own name where it has one below ``root``, else by the first link to it. Raises
    DataError if ``root`` is no folder or cannot be read.
    """
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; expected a folder of images")
    top, found, waiting, links, seen = (
        os.fspath(root),
        _Walk(root, [], {}, []),
        [""],
        deque[str](),
        dict[tuple[int, int], str](),
    )
    while waiting or links:
        folder = waiting.pop() if waiting else links.popleft()
        place, before = (f"{top}{os.sep}{folder}", f"{folder}{os.sep}") if folder else (top, "")
        try:
            status = os.stat(place)  # noqa: PTH116  # of many folders
            first = seen.setdefault((status.st_dev, status.st_ino), folder)
            if first is not folder:
                loop = f"{folder}{os.sep}".startswith(f"{first}{os.sep}") or not first
                same = f"the same folder as {Path(root, first)}"
                found.skipped.append((folder, "link to a folder that contains it" if loop else same))
                continue
            with os.scandir(place) as read:
                entries = sorted((one for one in read if one.name[0] != "."), key=lambda one: one.name)
        except OSError as error:
            if not folder:
                raise DataError(f"{root}: {error.strerror}; expected a readable folder of images") from error
            found.skipped.append((folder, error.strerror or str(error)))
            continue
        found.folders[folder] = status
        inside = list[str]()
        for entry in entries:
            name = before + entry.name
            try:
                status = entry.stat()
            except OSError as error:
                broken = f"broken link: {error.strerror}" if entry.is_symlink() else str(error.strerror)
                found.skipped.append((name, broken))
                continue
            zarr = stat.S_ISDIR(status.st_mode) and is_zarr(Path(root, name))
            if stat.S_ISDIR(status.st_mode) and not zarr:
                (links if entry.is_symlink() else inside).append(name)
            elif zarr or stat.S_ISREG(status.st_mode):
                found.files.append((name, status))
            else:
                found.skipped.append((name, "not a regular file"))
        waiting += reversed(inside)
    found.files.sort(key=lambda file: file[0].replace(os.sep, "\0"))  # as the parts of paths are ordered
    return found


def walk_files(root: Path, skipped: list[tuple[Path, str]]) -> list[tuple[Path, os.stat_result]]:
    """The regular files at all depths, and zarr arrays, sorted, and what is known of them.

    What is left out is added to ``skipped``. Every folder is read once: by its own name where it has one below
    ``root``, else by the first link to it. Raises DataError if ``root`` is no folder or cannot be read.
    """
    found = _walk(root)
    skipped += [(root / name, reason) for name, reason in found.skipped]
    return [(Path(root, name), status) for name, status in found.files]


def list_folder(root: Path) -> Listing:
    """The files of a folder: as an earlier call found them, where no folder has changed since, else as they are now.

    Raises DataError if ``root`` is no folder or cannot be read.
    """
    kept = _kept(root)
    if kept is not None and _unchanged(root, kept[1]):
        return kept[0]
    return _list_anew(root)


def _list_anew(root: Path, known: NDArray[np.uint64] | None = None) -> Listing:
    """What the folder holds now, which is kept unless the marks are those that are ``known``."""
    began, found = time.time_ns(), _walk(root)
    marks = _marks(found.files)
    paths = PathList(root, [name for name, _ in found.files])
    size = sum(status.st_size for _, status in found.files)
    listing = Listing(paths, size, marks, tuple(found.skipped))
    if len(marks) >= LEAST and not (known is not None and np.array_equal(marks, known)):
        folders = {name: _times(status, began) for name, status in found.folders.items()}
        about = {"format": FORMAT, "size": size, "skipped": found.skipped}
        with contextlib.suppress(OSError), atomic_path(_place(root)) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                names=np.frombuffer(paths.text, np.uint8),
                marks=marks,
                folders=np.frombuffer(PathList(root, [*folders]).text, np.uint8),
                times=np.array([*folders.values()], np.int64).reshape(-1, 2),
                about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            )
    return listing


def _place(root: Path) -> Path:
    return cache_folder("listings") / f"{hashlib.sha256(os.fsencode(root.absolute())).hexdigest()}.npz"


def _kept(root: Path) -> tuple[Listing, dict[str, tuple[int, int]]] | None:
    """The listing that was kept, and the times of its folders; None where there is none, or it is damaged."""
    try:
        with np.load(_place(root), allow_pickle=False) as found:
            about = json.loads(found["about"].tobytes())
            paths = PathList.of_text(root, found["names"].tobytes(), listed=True)
            folders = PathList.of_text(root, found["folders"].tobytes()).names()
            times, marks = found["times"], found["marks"]
        skipped = tuple((str(name), str(reason)) for name, reason in about["skipped"])
        sound = about["format"] == FORMAT and len(paths) == len(marks) and times.shape == (len(folders), 2)
        if not sound or marks.dtype != np.uint64 or times.dtype != np.int64 or not len(paths):
            return None
        known = dict(zip(folders, map(tuple, times.tolist()), strict=True))
        return Listing(paths, int(about["size"]), marks, skipped), known
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _times(status: os.stat_result, began: int) -> tuple[int, int]:
    """When a folder changed; -1 where that is so shortly before it was read that it says nothing."""
    times = status.st_mtime_ns, status.st_ctime_ns
    return times if max(times) < began - SETTLED_NS else (-1, -1)


def _unchanged(root: Path, folders: dict[str, tuple[int, int]]) -> bool:
    top = os.fspath(root)
    for name, times in folders.items():
        try:
            status = os.stat(f"{top}{os.sep}{name}")  # noqa: PTH116  # of many folders
        except OSError:
            return False
        if (status.st_mtime_ns, status.st_ctime_ns) != times:
            return False
    return bool(folders)


def check_files(listing: Listing, wish: str, check: Callable[[Path], str | None]) -> dict[int, str]:
    """Numbers of the files that are unusable, and the reasons: of ``check``, or known from an earlier call.

    Known is a file of the same name, size and time of change that was found usable for the same ``wish``; nothing else
    is trusted. It is kept as 8 bytes a file, where the user's cache can be written.

    Args:
        wish: everything that ``check`` depends on beside the file.
        check: called in threads.
    """
    paths, marks = listing.paths, listing.marks
    key = os.fsencode(f"{paths.root.absolute()}\0{wish}")
    place = cache_folder("listings") / f"{hashlib.sha256(key).hexdigest()}.npy"
    large = len(paths) >= LEAST
    kept = _read(place) if large else np.empty(0, np.uint64)
    left = [] if large and np.array_equal(marks, kept) else np.flatnonzero(~np.isin(marks, kept)).tolist()
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        reasons = pool.map(check, (paths[number] for number in left))
        unusable = {number: reason for number, reason in zip(left, reasons, strict=True) if reason is not None}
    if large and left:
        usable = np.ones(len(marks), bool)
        usable[[*unusable]] = False
        found = marks[usable]
        with contextlib.suppress(OSError):
            if not np.array_equal(found, kept):
                with atomic_path(place) as temporary:
                    np.save(temporary, found)
    return unusable


def _marks(files: Sequence[tuple[str, os.stat_result]]) -> NDArray[np.uint64]:
    """8 bytes for a name, size and time of change."""
    digests = b"".join(
        hashlib.blake2b(
            struct.pack("<qq", status.st_size, status.st_mtime_ns) + os.fsencode(name), digest_size=8
        ).digest()
        for name, status in files
    )
    return np.frombuffer(digests, np.uint64)


def _read(place: Path) -> NDArray[np.uint64]:
    """What was kept; nothing where that is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        found = np.load(place, allow_pickle=False)
        if found.dtype == np.uint64 and found.ndim == 1:
            return found
    return np.empty(0, np.uint64)


class ListingCheck:
    """Whether folders that were taken from earlier listings are as these say, found out beside other work.

    Args:
        sources: of images; those that are not of listed folders are passed over.
    """

    def __init__(self, sources: Iterable[Any]) -> None:
        self._roots = [root for root in dict.fromkeys(map(_listed_root, sources)) if root is not None]
        self._thread: threading.Thread | None = None
        self._lines = list[str]()

    def begin(self) -> None:
        """Start looking, unless that was done, or there is nothing to look at."""
        if self._roots:
            roots, self._roots = self._roots, []
            self._thread = threading.Thread(target=self._look, args=(roots,), name="listings", daemon=True)
            self._thread.start()

    def end(self) -> list[str]:
        """Wait until all is seen; a line for each folder that is not as it was listed, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        lines, self._lines = self._lines, []
        return lines

    def _look(self, roots: Sequence[Path]) -> None:
        for root in roots:
            kept = _kept(root)
            if kept is None:
                continue
            old = kept[0].marks
            try:
                now = _list_anew(root, old).marks
            except DataError as error:
                self._lines.append(f"notice: {error}")
                continue
            if not np.array_equal(old, now):
                new, gone = (int((~np.isin(*pair)).sum()) for pair in ((now, old), (old, now)))
                self._lines.append(
                    f"notice: {root} is not as it was listed: {new} file(s) are new or have changed, {gone} are gone "
                    "or have changed; this run keeps to its list, the next start takes the new one"
                )


def _listed_root(source: Any) -> Path | None:
    while hasattr(source, "numbers"):  # of a part of another source
        source = source.source
    paths = getattr(source, "paths", None)
    return paths.root if isinstance(paths, PathList) and paths.listed else None

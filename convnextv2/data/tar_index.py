"""Where the samples of a tar shard lie: read from the shard once, and kept beside it or in this user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from convnextv2.data.images import has_image_suffix
from convnextv2.files import write_json
from convnextv2.messages import one_line

SUFFIX = ".index.json"
"""Of the index beside a shard, behind the shard's whole name."""
_LONGEST_LABEL = 20
"""Bytes of a ``.cls`` member: a number, and space around it."""


@dataclass(frozen=True)
class TarIndex:
    """The samples of a shard that are whole, in their order.

    Args:
        size: bytes of the shard that this is the index of.
        names: of the image members.
        places: int64 ``[N, 2]``: where an image begins in the shard, and its bytes.
        labels: of each sample, -1 where it has none.
        skipped: members that are left out, and why.
    """

    size: int
    names: tuple[str, ...]
    places: NDArray[np.int64]
    labels: tuple[int, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def chosen(self, rows: Sequence[int]) -> TarIndex:
        """The index of some of the samples."""
        names, labels = tuple(self.names[row] for row in rows), tuple(self.labels[row] for row in rows)
        return TarIndex(self.size, names, self.places[list(rows)], labels)

    def write(self, path: Path) -> None:
        """As JSON, atomically; OSError if that cannot be done."""
        columns = {"names": self.names, "places": self.places.tolist(), "labels": self.labels, "skipped": self.skipped}
        write_json(path, {"size": self.size, **columns})


def read_index(text: str, size: int) -> TarIndex | None:
    """The index that :meth:`TarIndex.write` wrote of a shard of ``size`` bytes; None for anything else."""
    try:
        found = json.loads(text)
        names, labels = tuple(found["names"]), tuple(found["labels"])
        places = np.array(found["places"], dtype=np.int64).reshape(-1, 2)
        skipped = tuple((str(name), str(reason)) for name, reason in found["skipped"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    right = len(names) == len(labels) == len(places) and found["size"] == size
    right = right and all(isinstance(name, str) for name in names) and all(type(label) is int for label in labels)
    inside = (places >= 0).all() and (places <= size).all() and (places.sum(1) <= size).all()
    return TarIndex(size, names, places, labels, skipped) if right and inside else None


def scan(file: IO[bytes], size: int) -> TarIndex:
    """The index of a shard by its members' headers.

    A sample is the members that follow each other and share their name up to the first dot of its last part, as
    WebDataset has it: an image, and perhaps a label (``.cls``, a whole number). Where a shard ends too early, what is
    whole is kept, and the rest told in ``skipped``.
    """
    names, places, labels = list[str](), list[tuple[int, int]](), list[int]()
    skipped = list[tuple[str, str]]()
    sample = dict[str, Any]()

    def close() -> None:
        if not sample:
            return
        if "image" in sample:
            names.append(sample["name"])
            places.append(sample["image"])
            labels.append(sample.get("label", -1))
        else:
            skipped.append((sample["key"], "holds no image"))
        sample.clear()

    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                if not member.isreg() or member.issparse() or Path(member.name).name.startswith("."):
                    continue
                if member.size < 0 or member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                key, ending = split_key(member.name)
                if sample.get("key") != key:
                    close()
                    sample["key"] = key
                if ending == "cls":
                    label = _label(file, member, tar)
                    if label is None:
                        skipped.append((member.name, "is no whole number from 0 on"))
                    else:
                        sample["label"] = label
                elif "." not in ending and has_image_suffix(Path(f"x.{ending}")) and "image" not in sample:
                    sample["name"], sample["image"] = member.name, (member.offset_data, member.size)
            close()
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        close()
        where = f"after {names[-1]}" if names else "at its beginning"
        skipped.append(("", f"cannot be read on {where} ({one_line(error)[:120]})"))
    found = np.array(places, dtype=np.int64).reshape(-1, 2)
    return TarIndex(size, tuple(names), found, tuple(labels), tuple(skipped))


def split_key(name: str) -> tuple[str, str]:
    """The key of a member's sample, and its ending, in lower case, without the dot between them."""
    folder, _, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def _label(file: IO[bytes], member: tarfile.TarInfo, tar: tarfile.TarFile) -> int | None:
    if member.size > _LONGEST_LABEL:
        return None
    content = tar.extractfile(member)
    text = b"" if content is None else content.read().strip()
    return int(text) if text.isdigit() and len(text) < 10 else None


def index_of(path: Path) -> TarIndex:
    """The index of a shard on this machine: the one beside it or in the cache, if it is of this shard, else made anew.

    One that was made is kept in the cache, where that can be written: by the shard's place, size and time of change.

    Raises:
        OSError: if the shard cannot be read.
    """
    status = path.stat()
    beside = path.with_name(path.name + SUFFIX)
    stamp = f"{os.fsdecode(path.resolve())}\0{status.st_size}\0{status.st_mtime_ns}"
    kept = cache_folder() / f"{hashlib.sha256(os.fsencode(stamp)).hexdigest()}.json"
    for place in (beside, kept):
        text = _text(place)
        if text is not None and (place is kept or _as_old(place, status.st_mtime_ns)):
            found = read_index(text, status.st_size)
            if found is not None:
                return found
    with path.open("rb") as file:
        made = scan(file, status.st_size)
    with contextlib.suppress(OSError):  # the next start then reads the shard again
        made.write(kept)
    return made


def cache_folder(part: str = "shards") -> Path:
    """Where this user keeps what can be made again: ``XDG_CACHE_HOME``, or ``~/.cache``, and the project's name."""
    home = os.path.expanduser("~/.cache")  # noqa: PTH111  # Path's fails where there is no home
    return Path(os.environ.get("XDG_CACHE_HOME") or home) / "sparse-fcmae" / part


def _as_old(place: Path, changed: int) -> bool:
    """An index beside a shard is written after it."""
    return place.stat().st_mtime_ns >= changed


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None

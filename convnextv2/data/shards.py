"""Shards of WebDataset: tar files of images and labels, on this machine or behind an address.

Samples are read by number where they lie in the shards, so that all which holds for folders holds for them: the order
of a seed, exact epochs, any number of processes and loading processes, states inside of epochs. A shard that ends too
early costs its last samples, one that cannot be read all of them, and both are told.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convnextv2.data.decoding import Size, UnreadableImageError, Wanted
from convnextv2.data.encoded import Encoded
from convnextv2.data.encoded_sources import EncodedSource, settled_by_sample
from convnextv2.data.images import has_image_suffix
from convnextv2.data.piped import PIPE, PipeError, piped
from convnextv2.data.remote import RemoteFile, is_address, remote_index
from convnextv2.data.sources import DataError, OpenedSource, Part
from convnextv2.data.tar_index import TarIndex, index_of
from convnextv2.messages import one_line

ENDING = ".tar"
CLASSES = "classes.txt"
"""Beside the shards, or in the folder above: names of the classes, a line each, in the order of their numbers."""
PARTS = ("train", "val")
MOST_CLASSES = 1_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 1_000_000


@dataclass(frozen=True)
class ShardSource(EncodedSource):
    """The images of shards, by number.

    Args:
        shards: the files, or their addresses.
        indices: of each.
        in_chans, wanted: as :func:`~.images.load_image`.
    """

    shards: Sequence[Path | RemoteFile]
    indices: Sequence[TarIndex]
    in_chans: int
    wanted: Wanted
    _ends: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", np.cumsum([len(index.names) for index in self.indices], dtype=np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _find(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def name(self, index: int) -> str:
        """The shard and the member."""
        shard, inside = self._find(range(len(self))[index])
        return f"{self.shards[shard]}: {self.indices[shard].names[inside]}"

    def encoded(self, index: int) -> Encoded:
        """The member; UnreadableImageError if it cannot be had."""
        shard, inside = self._find(range(len(self))[index])
        start, size = self.indices[shard].places[inside].tolist()
        try:
            content = read_part(self.shards[shard], start, size)
        except OSError as error:
            raise UnreadableImageError(f"its shard cannot be read ({one_line(error)[:160]})") from error
        if len(content) < size:
            raise UnreadableImageError("its shard was cut after it had been indexed")
        return Encoded(content, self.indices[shard].names[inside])


def read_part(shard: Path | RemoteFile, start: int, size: int) -> bytes:
    """Bytes of a shard, fewer where it ends before; OSError if it cannot be read."""
    if isinstance(shard, RemoteFile):
        return shard.read(start, size)
    with shard.open("rb", buffering=0) as file:
        file.seek(start)
        return file.read(size)


def expanded(spec: str) -> list[str]:
    """``a-{00..12}.tar`` as thirteen names; DataError for a range that is turned round, or too many."""
    ranges = [(first, last) for first, last in _RANGE.findall(spec)]
    counts = [int(last) - int(first) + 1 for first, last in ranges]
    if any(count < 1 for count in counts) or np.prod([*counts, 1], dtype=float) > _MOST_SHARDS:
        raise DataError(f"{spec}: a range of shards counts upwards, to at most {_MOST_SHARDS} of them")
    pieces = _RANGE.split(spec)[::3]
    numbers = [
        [str(number).zfill(len(first) if first.startswith("0") else 1) for number in range(int(first), int(last) + 1)]
        for first, last in ranges
    ]
    return [
        pieces[0] + "".join(number + piece for number, piece in zip(chosen, pieces[1:], strict=True))
        for chosen in product(*numbers)
    ]


def files_in(folder: Path, ending: str = ENDING, beside: Collection[str] = PARTS) -> list[Path]:
    """The files of that ending directly in a folder, sorted; none where it holds images, which are then meant, or
    folders that are not among those ``beside``, or hold images or class folders of their own."""
    found = list[Path]()
    with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.name not in beside or _is_meant(path):
                    return []
            elif path.suffix.lower() == ending:
                found.append(path)
            elif has_image_suffix(path):
                return []
    return sorted(found)


def _is_meant(folder: Path) -> bool:
    """Whether a folder holds images or folders, perhaps of classes: an archive beside it is what they came from."""
    with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
        return any(
            not entry.name.startswith(".") and (entry.is_dir() or has_image_suffix(Path(entry.name)))
            for entry in entries
        )
    return False


class ShardKind:
    """Tar shards: a folder of them, with ``train`` and ``val`` or without, one shard, or ``NAME-{000..123}.tar``; the
    latter two may be addresses, such as ``https://…`` and ``s3://…``, and commands, as ``pipe:…``."""

    expects = "shards, as NAME-{000..123}.tar or a folder of .tar files"

    def claims(self, spec: str) -> bool:
        if spec.endswith(ENDING) or spec.startswith(PIPE):
            return True
        folder = Path(spec)
        return any(files_in(one) for one in (folder, *(folder / part for part in PARTS)))

    def open(self, spec: str, *, in_chans: int, img_size: Size, labelled: bool, wanted: Wanted) -> OpenedSource:
        """As :func:`~.opening.open_source`."""
        folder, lists = Path(spec), dict[str, Sequence[Path | RemoteFile | str]]()
        if spec.startswith(PIPE):
            lists = {"": expanded(spec)}
        elif not spec.endswith(ENDING):
            lists = {part: [*files_in(folder / part)] for part in PARTS}
            lists = lists if all(lists.values()) else {"": [*files_in(folder)] or lists["train"] or lists["val"]}
        elif is_address(spec):
            lists = {"": [RemoteFile(name) for name in expanded(spec)]}
        else:
            lists = {"": [Path(name) for name in expanded(spec)]}
        chosen = [name for name in lists if labelled or name != "val"]
        found = [_images(lists[name], in_chans, labelled, wanted) for name in chosen]
        wanted = settled_by_sample(wanted, found[0][0])
        parts = [Part(replace(images, wanted=wanted), labels, skipped) for images, labels, skipped in found]
        if not len(found[0][0]):
            first = "".join(f"; {path}: {reason}" for path, reason in parts[0].skipped[:1])
            raise DataError(f"{spec}: found no usable image in {len(lists[chosen[0]])} shard(s){first}")
        numbers = [label for part in parts for label in part.labels or ()]
        classes = _classes(found[0][0].shards[0], max(numbers, default=-1))
        return OpenedSource(spec, parts[0], parts[1] if len(parts) > 1 else None, classes)


def _images(
    shards: Sequence[Path | RemoteFile | str], in_chans: int, labelled: bool, wanted: Wanted
) -> tuple[ShardSource, list[int] | None, list[tuple[Path, str]]]:
    """Images of shards, their labels where all have them or where they are insisted on, and what is left out."""
    indices, skipped, usable = list[TarIndex](), list[tuple[Path, str]](), list[Path | RemoteFile]()
    for named in shards:
        try:
            shard = piped(named) if isinstance(named, str) else named
            found = remote_index(shard) if isinstance(shard, RemoteFile) else index_of(shard)
        except (OSError, PipeError) as error:
            skipped.append((Path(str(named)), one_line(getattr(error, "strerror", None) or error)))
            continue
        skipped += [(Path(f"{shard}: {name}" if name else str(shard)), reason) for name, reason in found.skipped]
        if labelled and -1 in found.labels:
            rows = [row for row, label in enumerate(found.labels) if label >= 0]
            unlabelled = set(range(len(found.names))) - {*rows}
            skipped += [(Path(f"{shard}: {found.names[row]}"), "has no label (.cls)") for row in sorted(unlabelled)]
            found = found.chosen(rows)
        indices.append(found)
        usable.append(shard)
    labels = [label for index in indices for label in index.labels]
    return ShardSource(usable, indices, in_chans, wanted), None if -1 in labels else labels, skipped


def _classes(shard: Path | RemoteFile, highest: int) -> list[str]:
    """Names of the classes: those of the file beside the shards, or numbers."""
    if highest >= MOST_CLASSES:
        raise DataError(f"{shard}: holds the label {highest}; expected numbers of classes, from 0 on")
    if isinstance(shard, RemoteFile):
        text = shard.beside(CLASSES)
    else:
        places = [folder / CLASSES for folder in (shard.parent, shard.parent.parent)]
        found = next((place for place in places if place.is_file()), None)
        text = None if found is None else found.read_text(encoding="utf-8", errors="backslashreplace")
    names = [] if text is None else [one_line(line) for line in text.splitlines() if line.strip()]
    if names and len({*names}) < len(names):
        raise DataError(f"{CLASSES} of {shard}: names a class twice")
    if names and len(names) <= highest:
        raise DataError(f"{CLASSES} of {shard}: names {len(names)} classes, but there is the label {highest}")
    return names or [str(number) for number in range(highest + 1)]


SOURCE_KIND = ShardKind()

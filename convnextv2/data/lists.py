"""Lists of image files: ``.txt``, one file a line, and ``.csv``, with a label and a part for each."""

from __future__ import annotations

import csv
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from convnextv2.data.decoding import Size, UnreadableImageError, Wanted, is_zarr
from convnextv2.data.encoded import Encoded, Stored
from convnextv2.data.encoded_sources import EncodedSource
from convnextv2.data.images import has_image_suffix, why_unusable
from convnextv2.data.names import shown
from convnextv2.data.native import settled
from convnextv2.data.remote import RemoteFile, is_address
from convnextv2.data.sources import DataError, FileSource, OpenedSource, Part
from convnextv2.messages import one_line

FILE, LABEL, PART = ("file", "path", "filename", "filepath", "image"), ("label", "class"), ("part", "split")
"""Names of columns, the first of which is the one to use."""
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}

Row = tuple[str, str | None, str]
"""File, label, part."""


@dataclass(frozen=True)
class RemoteSource(EncodedSource):
    """Images of files, some or all of which lie behind addresses."""

    files: Sequence[Path | RemoteFile]
    in_chans: int
    wanted: Wanted

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The file, or its address."""
        return str(self.files[index])

    def encoded(self, index: int) -> Stored:
        """The file, fetched where it lies behind an address; UnreadableImageError if it cannot be had."""
        file = self.files[index]
        if isinstance(file, Path):
            return file
        try:
            return Encoded(file.read(0, file.size()), PurePosixPath(file.address.partition("?")[0]).name)
        except OSError as error:
            raise UnreadableImageError(f"cannot be fetched ({one_line(error)[:160]})") from error


def read_list(path: Path) -> list[Row]:
    """The rows of a list; DataError, naming the line, for one that is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or 'is no text in UTF-8'}") from error
    if path.suffix.lower() == ".txt":
        return [(line.strip(), None, "train") for line in text.splitlines() if line.strip()]
    try:
        table = [row for row in csv.reader(text.splitlines(), strict=True) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{path}: {one_line(error)}; expected comma-separated columns") from error
    header = [cell.strip().lower() for cell in table[0]] if table else []
    places = [next((header.index(name) for name in names if name in header), None) for names in (FILE, LABEL, PART)]
    if places[0] is None:
        named = not {*LABEL, *PART}.isdisjoint(header) and not has_image_suffix(Path(table[0][0]))
        if table and (named or len(table[0]) > 2):
            raise DataError(
                f"{path}: has {len(table[0])} columns and none is called `file`; name them in the first line"
            )
        places = [0, 1 if table and len(table[0]) == 2 else None, None]
    else:
        table = table[1:]
    rows = list[Row]()
    for number, cells in enumerate(table, 1):
        if len(cells) <= max(place for place in places if place is not None):
            raise DataError(f"{path}: row {number} has {len(cells)} column(s): {one_line(','.join(cells))[:80]}")
        file, label, part = (None if place is None else cells[place].strip() for place in places)
        if not file or (label is not None and not label) or (part or "train").lower() not in PARTS:
            what = "no file" if not file else "no label" if label == "" else f"the part {one_line(part)[:40]!r}"
            raise DataError(f"{path}: row {number} has {what}; expected a file, a label, and train or val")
        rows.append((file, label, PARTS[(part or "train").lower()]))
    return rows


class ListKind:
    """A list of image files; what is not absolute is sought from the folder of the list."""

    expects = "a list of files, .txt or .csv"

    def claims(self, spec: str) -> bool:
        return spec.lower().endswith((".txt", ".csv")) and Path(spec).is_file()

    def open(self, spec: str, *, in_chans: int, img_size: Size, labelled: bool, wanted: Wanted) -> OpenedSource:
        """As :func:`~.opening.open_source`."""
        rows = read_list(Path(spec))
        if labelled and any(label is None for _, label, _ in rows):
            raise DataError(f"{spec}: has no labels; expected a column `label`")
        parts = {}
        near = [Path(spec).parent / name for name, _, part in rows if part == "train" and not is_address(name)]
        wanted = settled(wanted, near)
        for name in ("train", "val"):
            chosen = [row for row in rows if row[2] == name]
            if chosen and (labelled or name == "train"):
                parts[name] = _part(Path(spec).parent, chosen, in_chans, wanted)
        if "train" not in parts or not len(parts["train"][0].by_number):
            skipped = [one for part, _ in parts.values() for one in part.skipped[:1]]
            first = "".join(f"; {path}: {reason}" for path, reason in skipped[:1])
            raise DataError(f"{spec}: lists no usable image to train on{first}")
        classes = sorted({label for _, labels in parts.values() for label in labels if label is not None})
        number: dict[str | None, int] = {label: place for place, label in enumerate(classes)}
        found = {
            name: replace(part, labels=[number[label] for label in labels] if classes else None)
            for name, (part, labels) in parts.items()
        }
        return OpenedSource(spec, found["train"], found.get("val"), [*map(shown, classes)])


def _part(folder: Path, rows: Sequence[Row], in_chans: int, wanted: Wanted) -> tuple[Part, list[str | None]]:
    """The images that can be had, and the name of the class of each."""
    files = [RemoteFile(name) if is_address(name) else folder / name for name, _, _ in rows]
    alone = threading.Lock()

    def problem(file: Path | RemoteFile) -> str | None:
        if isinstance(file, RemoteFile):
            return None
        try:
            return (
                why_unusable(file, in_chans, False, wanted, alone)
                if file.is_file() or is_zarr(file)
                else "no such file"
            )
        except OSError as error:
            return error.strerror or str(error)

    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        problems = list(pool.map(problem, files))
    good = [number for number, found in enumerate(problems) if found is None]
    skipped = [(Path(str(files[number])), found) for number, found in enumerate(problems) if found is not None]
    kept = [files[number] for number in good]
    local = [file for file in kept if isinstance(file, Path)]
    images = FileSource(local, in_chans, wanted) if len(local) == len(kept) else RemoteSource(kept, in_chans, wanted)
    return Part(images, None, skipped), [rows[number][1] for number in good]


SOURCE_KIND = ListKind()

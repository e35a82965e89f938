"""Parquet files of images and labels, read by number through their row groups.

Of a file no more than a row group of one column is in memory at a time. So an image costs the reading of its group,
unless that was read shortly before: files of large groups are rewritten in small pieces once, into the user's cache.
"""

from __future__ import annotations

import glob
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convnextv2.data.decoding import Size, UnreadableImageError, Wanted
from convnextv2.data.encoded import Stored
from convnextv2.data.encoded_sources import EncodedSource, settled_by_sample
from convnextv2.data.names import shown
from convnextv2.data.remote import RemoteFile, is_address
from convnextv2.data.shards import expanded, files_in
from convnextv2.data.sources import DataError, OpenedSource
from convnextv2.data.spool import check_free, spooled
from convnextv2.data.tables import (
    TRAIN,
    VAL,
    class_names,
    image_column,
    image_of,
    is_whole,
    label_column,
    library,
    numbered,
    part_of,
    parts_by_name,
)
from convnextv2.messages import one_line

ENDING = ".parquet"
KEPT_BYTES = 2**28
"""Of row groups that a process keeps, the last ones read."""
MOST_GROUP, GROUP = 2**28, 2**22
"""Bytes of the images of a row group that is read as it is, and of one that is written instead of a larger one."""
_SPLIT = re.compile(rf"({'|'.join((*TRAIN, *VAL, 'test'))})(?![a-z])", re.I)


@dataclass(frozen=True)
class ParquetFile:
    """A file as it was when it was opened.

    Args:
        named: the file that the user named.
        place: where it is read: that, or what it was rewritten to.
        stamp: size and time of change; of another file at that place nothing that is kept counts.
        rows: of each row group.
    """

    named: Path | RemoteFile
    place: Path | RemoteFile
    stamp: tuple[int, int]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Columns:
    """Names of the columns of images and of labels, type of the labels, names of the classes where they are known."""

    image: str
    label: str | None
    kind: str = ""
    classes: tuple[str, ...] | None = None


class _Groups:
    """The last row groups that this process read, up to :data:`KEPT_BYTES`, and the files that they are of."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = -1
        self._kept = OrderedDict[Any, Any]()
        self._open = OrderedDict[Any, Any]()

    def read(self, file: ParquetFile, number: int, column: str) -> Any:
        """A column of a row group, pyarrow's; whatever pyarrow raises for a damaged one."""
        with self._lock:
            if self._process != os.getpid():  # files that were opened before a fork are of the other process
                self._process, self._kept, self._open = os.getpid(), OrderedDict(), OrderedDict()
            key = file.place, file.stamp, number, column
            if key not in self._kept:
                found = self._reader(file).read_row_group(number, columns=[column], use_threads=False).column(0)
                held = found.nbytes + sum(cells.nbytes for cells in self._kept.values())
                while self._kept and held > KEPT_BYTES:
                    held -= self._kept.popitem(last=False)[1].nbytes
                self._kept[key] = found
            self._kept.move_to_end(key)
            return self._kept[key]

    def _reader(self, file: ParquetFile) -> Any:
        key = file.place, file.stamp
        if key not in self._open:
            self._open[key] = open_parquet(file.place)
            if len(self._open) > 64:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        return self._open[key]


_groups = _Groups()


def open_parquet(place: Path | RemoteFile, buffer: int = 0) -> Any:
    """pyarrow's reader of a file; OSError or ValueError if it is none."""
    from pyarrow import parquet

    file = place.open() if isinstance(place, RemoteFile) else place
    return parquet.ParquetFile(file, buffer_size=buffer, pre_buffer=False)


@dataclass(frozen=True)
class ParquetSource(EncodedSource):
    """The images of parquet files, by number.

    Args:
        files: in their order.
        column: that holds the images.
        in_chans, wanted: as :func:`~.images.load_image`.
    """

    files: Sequence[ParquetFile]
    column: str
    in_chans: int
    wanted: Wanted
    _ends: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    _groups: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = [count for file in self.files for count in file.rows]
        groups = [(number, group) for number, file in enumerate(self.files) for group in range(len(file.rows))]
        object.__setattr__(self, "_ends", np.cumsum(rows, dtype=np.int64))
        object.__setattr__(self, "_groups", np.array(groups, np.int64).reshape(-1, 2))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _find(self, index: int) -> tuple[ParquetFile, int, int]:
        """File, row group and row in it."""
        place = int(np.searchsorted(self._ends, index, side="right"))
        file, group = self._groups[place].tolist()
        return self.files[file], group, index - (int(self._ends[place - 1]) if place else 0)

    def name(self, index: int) -> str:
        """The file and the row, from 0."""
        file, group, row = self._find(range(len(self))[index])
        return f"{file.named}: row {sum(file.rows[:group]) + row}"

    def encoded(self, index: int) -> Stored:
        """The file in a cell; UnreadableImageError if it cannot be had."""
        file, group, row = self._find(range(len(self))[index])
        try:
            cell = _groups.read(file, group, self.column)[row].as_py()
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise UnreadableImageError(f"its row group cannot be read ({one_line(error)[:160]})") from error
        return image_of(cell, file.named.parent if isinstance(file.named, Path) else Path())


def parquet_in(folder: Path) -> list[Path]:
    """The parquet files of a folder, by the rule for shards; where it has none, those of ``data`` or of its parts."""
    found = files_in(folder, ENDING, ("data", *TRAIN, *VAL, "test"))
    if not found and not (found := files_in(folder / "data", ENDING)):
        found = [path for part in (*TRAIN, *VAL) for path in files_in(folder / part, ENDING)]
    return found


def split_of(path: Path | RemoteFile, root: str) -> str:
    """The split that a file's name begins with, or its folder's below ``root``; empty where neither does."""
    folder, name = os.path.split(path.address.partition("?")[0] if isinstance(path, RemoteFile) else path)
    match = _SPLIT.match(name)
    if match is None and Path(folder) != Path(root):
        match = _SPLIT.fullmatch(os.path.basename(folder))  # noqa: PTH119
    return "" if match is None else match[1].lower()


class ParquetKind:
    """Parquet files: one, a folder of them, a pattern with ``*``, or ``NAME-{000..123}.parquet``; the first and the
    last may be addresses."""

    expects = "parquet files, as FILE.parquet, 'FOLDER/*.parquet', or a folder of them"

    def claims(self, spec: str) -> bool:
        return spec.lower().partition("?")[0].endswith(ENDING) or bool(parquet_in(Path(spec)))

    def open(self, spec: str, *, in_chans: int, img_size: Size, labelled: bool, wanted: Wanted) -> OpenedSource:
        """As :func:`~.opening.open_source`."""
        library("pyarrow", spec, "parquet")
        places = self._places(spec)
        splits = {place: split_of(place, spec) for place in places}
        chosen = parts_by_name([*dict.fromkeys(splits.values())])
        skipped = [
            (Path(str(place)), f"is of the split {split}" if split else "is of no split to train or validate on")
            for place, split in splits.items()
            if len(places) > 1 and split not in (*chosen["train"], *chosen["val"])
        ]
        tables = {name: _Table(spec) for name in chosen if name == "train" or (labelled and chosen["val"])}
        columns: Columns | None = None
        for name, table in tables.items():
            for place in places:
                if splits[place] in chosen[name]:
                    columns = table.add(place, columns)
        skipped += tables["train"].skipped
        if columns is None or not any(sum(file.rows) for file in tables["train"].files):
            first = "".join(f"; {path}: {reason}" for path, reason in skipped[:1])
            raise DataError(f"{spec}: found no image in {len(places)} parquet file(s){first}")
        images = {name: ParquetSource(table.files, columns.image, in_chans, wanted) for name, table in tables.items()}
        wanted = settled_by_sample(wanted, images["train"])
        labels, classes = dict[str, Any](), list[str]()
        if columns.label is not None:
            numbers, classes = numbered([table.labels for table in tables.values()], columns.classes, spec)
            labels = dict(zip(tables, numbers, strict=True))
        parts = {
            name: part_of(replace(one, wanted=wanted), labels.get(name), labelled, spec) for name, one in images.items()
        }
        told = {"train": skipped, "val": tables["val"].skipped if "val" in tables else []}
        train, val = (
            replace(parts[name], skipped=[*told[name], *parts[name].skipped]) if name in parts else None
            for name in told
        )
        assert train is not None
        return OpenedSource(spec, train, val, [*map(shown, classes)])

    def _places(self, spec: str) -> list[Path | RemoteFile]:
        if is_address(spec):
            return [RemoteFile(name) for name in expanded(spec)]
        if Path(spec).is_dir():
            return [*parquet_in(Path(spec))]
        if not Path(spec).exists() and glob.has_magic(spec):
            found = sorted(glob.glob(spec, recursive=True))  # noqa: PTH207  # a pattern of any folder
            if not found:
                raise DataError(f"{spec}: no file fits this pattern")
            return [*map(Path, found)]
        return [*map(Path, expanded(spec))]


class _Table:
    """Files of a part, as they are opened, their labels, and what is left out."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.files, self.labels, self.skipped = list[ParquetFile](), list[Any](), list[tuple[Path, str]]()

    def add(self, named: Path | RemoteFile, expected: Columns | None) -> Columns | None:
        """Open a file, or tell why it is left out; its columns are those that are expected, else said."""
        try:
            reader = open_parquet(named)
            columns = _columns(reader.schema_arrow, str(named) if expected else self.spec)
            if expected is not None and (columns.image, columns.label, columns.kind) != (
                expected.image,
                expected.label,
                expected.kind,
            ):
                raise ValueError(f"its columns are not those of the first file, {expected.image} and {expected.label}")
            place = _in_small_groups(named, reader, columns)
            reader = reader if place is named else open_parquet(place)
            labels = [] if columns.label is None else _values(reader, columns.label)
            rows = tuple(reader.metadata.row_group(number).num_rows for number in range(reader.num_row_groups))
        except DataError as error:
            if expected is None:
                raise
            self.skipped.append((Path(str(named)), str(error).removeprefix(f"{named}: ")))
            return expected
        except (OSError, ValueError) as error:
            self.skipped.append((Path(str(named)), one_line(getattr(error, "strerror", None) or error)[:200]))
            return expected
        self.files.append(ParquetFile(named, place, _stamp(place), rows))
        self.labels += labels
        return expected or columns


def _columns(schema: Any, spec: str) -> Columns:
    label = label_column(schema)
    names = class_names(schema, label)
    kind = "" if label is None else "numbers" if is_whole(schema.field(label).type) else "names"
    return Columns(image_column(schema, spec), label, kind, None if names is None else tuple(names))


def _values(reader: Any, column: str) -> list[Any]:
    return reader.read([column], use_threads=False).column(0).to_pylist()


def _stamp(place: Path | RemoteFile) -> tuple[int, int]:
    if isinstance(place, RemoteFile):
        return 0, 0
    status = place.stat()
    return status.st_size, status.st_mtime_ns


def _in_small_groups(named: Path | RemoteFile, reader: Any, columns: Columns) -> Path | RemoteFile:
    """The file, or one in the cache with the same rows in smaller groups, where a group of it is too large."""
    about = [reader.metadata.row_group(number) for number in range(reader.num_row_groups)]
    if all(_image_bytes(group, columns.image) <= MOST_GROUP or group.num_rows == 1 for group in about):
        return named
    rows, size = reader.metadata.num_rows, sum(_image_bytes(group, columns.image) for group in about)
    step = max(1, min(1024, int(rows * GROUP // size)))
    chosen = [columns.image] if columns.label is None else [columns.image, columns.label]

    def write(path: Path) -> None:
        from pyarrow import parquet

        source = open_parquet(named, 2**20)
        schema = source.schema_arrow
        schema = schema.empty_table().select(chosen).schema
        with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            for batch in source.iter_batches(step, columns=chosen, use_threads=False):
                writer.write_batch(batch.select(chosen))
                check_free(path.parent)

    return spooled(str(named), f"{named}\0{_stamp(named)}\0{size}\0{rows}\0{chosen}", ENDING, write)


def _image_bytes(group: Any, column: str) -> int:
    """Bytes of the images of a row group, uncompressed."""
    about = [group.column(number) for number in range(group.num_columns)]
    return sum(one.total_uncompressed_size for one in about if one.path_in_schema.partition(".")[0] == column)


SOURCE_KIND = ParquetKind()

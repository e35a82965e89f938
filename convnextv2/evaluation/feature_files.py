"""Features in files, written as they come: numpy's archives, and parquet for tables."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from convnextv2.outputs import Kind, is_stream, output_file

MARK = "sparse-fcmae"
"""What tells a file that was written here: an entry of an archive, a key of a table's metadata."""
ROW_GROUP_BYTES = 2**26
"""Of features in a row group of a table, and so in memory."""
_NAMES = 2**16
"""That are made numpy's at a time."""


class Sink(Protocol):
    """Takes features batch by batch."""

    def write(self, values: NDArray[Any], names: Sequence[str], labels: Sequence[int]) -> None:
        """Features ``[n, …]`` of n images, what these are called, and the numbers of their classes, -1 for none."""

    def finish(self) -> None:
        """Complete the file."""


def _is_archive(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return f"{MARK}.npy" in archive.namelist()


def _is_table(path: Path) -> bool:
    with path.open("rb") as file:
        end = file.seek(0, 2)
        if end < 12:
            return False
        file.seek(end - 8)
        length, mark = int.from_bytes(file.read(4), "little"), file.read(4)
        if mark != b"PAR1" or not 0 < length <= min(end - 12, 2**28):
            return False
        file.seek(end - 8 - length)
        return MARK.encode() in file.read(length)


def is_ours(path: Path) -> bool:
    """Whether a file of features was written here."""
    return _is_table(path) if path.suffix.lower() == ".parquet" else _is_archive(path)


FEATURES = Kind("a file of features", (".npz", ".parquet"), is_ours)


def why_no_file(path: Path) -> str | None:
    """What is missing to write such a file, and how it is got; None if nothing is."""
    if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        return "parquet needs pyarrow; install with: pip install pyarrow, or write .npz"
    return None


class Archive:
    """An uncompressed ``.npz``: ``features``, ``names``, ``labels``, ``classes``, and an entry for each of ``about``,
    a scalar or a list of numbers.

    Features lie in a file without a name, beside the archive, until their number is known: twice their size on the disk
    for a moment, and one batch in memory. Raises ValueError if a batch has other sizes than the first.
    """

    def __init__(self, path: Path, classes: Sequence[str], about: Mapping[str, Any]) -> None:
        self._path, self._classes, self._about = path, classes, about
        self._raw: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # closed by close()
        self._names, self._labels = list[str](), list[int]()
        self._shape: tuple[int, ...] | None = None
        self._dtype = np.dtype(np.float32)

    def write(self, values: NDArray[Any], names: Sequence[str], labels: Sequence[int]) -> None:
        if self._shape is None:
            self._shape, self._dtype = values.shape[1:], values.dtype
        if values.shape[1:] != self._shape:
            raise ValueError(f"expected features {list(self._shape)}, got {list(values.shape[1:])}")
        self._raw.write(np.ascontiguousarray(values).tobytes())
        self._names += names
        self._labels += labels

    def finish(self) -> None:
        with zipfile.ZipFile(self._path, "w", zipfile.ZIP_STORED) as archive:
            with _entry(archive, "features") as file:
                _header(file, (len(self._names), *(self._shape or ())), self._dtype)
                self._raw.seek(0)
                shutil.copyfileobj(self._raw, file, 2**20)
            with _entry(archive, "names") as file:
                widest = np.dtype(f"<U{max(1, *map(len, self._names), 1)}")
                _header(file, (len(self._names),), widest)
                for start in range(0, len(self._names), _NAMES):
                    file.write(np.array(self._names[start : start + _NAMES], widest).tobytes())
            arrays = {"labels": np.array(self._labels, np.int64), "classes": np.array(self._classes, np.str_)}
            arrays |= {key: np.array(value) for key, value in {**self._about, MARK: 1}.items()}
            for name, array in arrays.items():
                with _entry(archive, name) as file:
                    npy.write_array(file, array, allow_pickle=False)

    def close(self) -> None:
        """Let go of the file beside the archive."""
        self._raw.close()


def _entry(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    return archive.open(f"{name}.npy", "w", force_zip64=True)


def _header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_2_0(file, header)


class Table:
    """A parquet file: ``name``, ``label`` (text, or null) and ``features`` a row, a list of one length; patches are
    Arrow's tensors of fixed shape. The rest is JSON in the metadata of its schema, under :data:`MARK`.

    A row group of :data:`ROW_GROUP_BYTES` is in memory. Raises ValueError if a batch has other sizes than the first.
    """

    def __init__(self, path: Path, classes: Sequence[str], about: Mapping[str, Any]) -> None:
        self._path, self._classes, self._about = path, classes, about
        self._writer: Any = None
        self._kind: Any = None
        self._shape: tuple[int, ...] | None = None
        self._waiting: list[tuple[NDArray[Any], Sequence[str], Sequence[int]]] = []
        self._bytes = 0

    def write(self, values: NDArray[Any], names: Sequence[str], labels: Sequence[int]) -> None:
        if self._shape is None:
            self._open(values)
        if values.shape[1:] != self._shape:
            raise ValueError(f"expected features {list(self._shape or ())}, got {list(values.shape[1:])}")
        self._waiting.append((np.ascontiguousarray(values), list(names), list(labels)))
        self._bytes += values.nbytes
        if self._bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _open(self, values: NDArray[Any]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        self._shape = values.shape[1:]
        number = pa.from_numpy_dtype(values.dtype)
        if len(self._shape) == 1:
            self._kind = pa.list_(number, self._shape[0])
        else:
            self._kind = pa.fixed_shape_tensor(number, self._shape)
        fields = [pa.field("name", pa.string(), False), pa.field("label", pa.string())]
        metadata = {MARK: json.dumps({**self._about, "classes": list(self._classes)})}
        schema = pa.schema([*fields, pa.field("features", self._kind, False)], metadata)
        self._writer = parquet.ParquetWriter(self._path, schema, use_dictionary=["label"], compression="zstd")

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._waiting:
            return
        values = np.concatenate([part for part, _, _ in self._waiting])
        names = [name for _, part, _ in self._waiting for name in part]
        labels = [self._classes[n] if n >= 0 else None for _, _, part in self._waiting for n in part]
        stored = getattr(self._kind, "storage_type", self._kind)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=stored)
        if stored is not self._kind:
            lists = pa.ExtensionArray.from_storage(self._kind, lists)
        columns = [pa.array(names, pa.string()), pa.array(labels, pa.string()), lists]
        self._writer.write_table(pa.table(columns, schema=self._writer.schema), row_group_size=len(names))
        self._waiting, self._bytes = [], 0

    def finish(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        if self._writer is not None and self._writer.is_open:
            self._writer.close()


@contextlib.contextmanager
def feature_file(path: Path, classes: Sequence[str], about: Mapping[str, Any]) -> Iterator[Sink]:
    """A file of features, ``.parquet`` or else ``.npz``, to be written to batch by batch; it is there when the block
    ends well.

    Args:
        path: where, or a stream, which gets an ``.npz``.
        classes: names of the labels.
        about: what else is said, text, numbers and lists of numbers: how features were pooled, and such.

    Raises:
        ValueError: if pyarrow is missing.
        OSError: if it cannot be written.
    """
    if reason := why_no_file(path):
        raise ValueError(reason)
    kind = Table if path.suffix.lower() == ".parquet" and not is_stream(path) else Archive
    with output_file(path, stream_suffix=".npz") as temporary:
        sink = kind(temporary, classes, about)
        with contextlib.closing(sink):
            yield sink
            sink.finish()

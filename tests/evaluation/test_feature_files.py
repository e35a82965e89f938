"""Files of features, as numpy and pyarrow read them."""

from __future__ import annotations

import importlib.util
import json
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from convnextv2.evaluation import feature_files
from convnextv2.evaluation.feature_files import FEATURES, feature_file, is_ours, why_no_file
from convnextv2.outputs import OutputError, check_output

ABOUT = {"pooling": "mean", "mean": [0.5, 0.25], "img_size": [32, 64], "per_patch": False}
NAMES = ["a/1.png", "日本/ü.png", "x" * 200, ""]
LABELS = [0, 1, -1, 0]


def write(path: Path, values: np.ndarray[Any, Any], parts: int = 2, names: list[str] = NAMES) -> Path:
    with feature_file(path, ["a", "b"], ABOUT) as sink:
        for rows in np.array_split(np.arange(len(values)), parts):
            sink.write(values[rows], [names[row] for row in rows], [LABELS[row] for row in rows])
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
def test_an_archive_as_numpy_reads_it(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=(4, *shape)).astype(dtype)
    with np.load(write(tmp_path / "f.npz", values), allow_pickle=False) as found:
        assert found["features"].dtype == dtype
        assert np.array_equal(found["features"], values)
        assert found["names"].tolist() == NAMES
        assert found["labels"].tolist() == LABELS
        assert found["classes"].tolist() == ["a", "b"]
        assert found["pooling"] == "mean"
        assert found["img_size"].tolist() == [32, 64]
        assert not found["per_patch"]
    first = (tmp_path / "f.npz").read_bytes()
    assert write(tmp_path / "f.npz", values, parts=4).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]
    assert zipfile.ZipFile(tmp_path / "f.npz").testzip() is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
def test_a_table_as_pyarrow_reads_it(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_files, "ROW_GROUP_BYTES", 1)  # a row group for each batch
    values = np.random.default_rng(0).normal(size=(4, *shape)).astype(dtype)
    table = pq.read_table(write(tmp_path / "f.parquet", values))
    assert pq.ParquetFile(tmp_path / "f.parquet").num_row_groups == 2
    assert table["name"].to_pylist() == NAMES
    assert table["label"].to_pylist() == ["a", "b", None, "a"]
    column = table["features"].combine_chunks()
    if len(shape) == 1:
        found = np.stack([np.array(row, dtype) for row in column.to_pylist()])
    else:
        found = column.to_numpy_ndarray()
    assert found.dtype == dtype
    assert np.array_equal(found, values)
    assert json.loads(table.schema.metadata[b"sparse-fcmae"]) == {**ABOUT, "classes": ["a", "b"]}


@pytest.mark.parametrize("name", ["f.npz", "f.parquet"])
def test_memory_does_not_grow_with_the_images(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_files, "ROW_GROUP_BYTES", 2**20)
    batch = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)  # 1 MiB
    with feature_file(tmp_path / name, [], ABOUT) as sink:
        sink.write(batch, ["x"] * 64, [-1] * 64)
        tracemalloc.start()
        for _ in range(40):
            sink.write(batch, ["x"] * 64, [-1] * 64)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * 2**20
    rows = (
        len(np.load(tmp_path / name)["names"]) if name.endswith("npz") else pq.read_metadata(tmp_path / name).num_rows
    )
    assert rows == 41 * 64


@pytest.mark.parametrize("name", ["f.npz", "f.parquet"])
def test_what_fails_leaves_the_file_of_before(tmp_path: Path, name: str) -> None:
    values = np.ones((4, 3), np.float32)
    before = write(tmp_path / name, values).read_bytes()
    with pytest.raises(RuntimeError, match="half"), feature_file(tmp_path / name, [], ABOUT) as sink:
        sink.write(values, NAMES, LABELS[2:3] * 4)
        raise RuntimeError("half")
    wrong = pytest.raises(ValueError, match=r"expected features \[3\], got \[4\]")
    with wrong, feature_file(tmp_path / name, [], ABOUT) as sink:
        sink.write(values, NAMES, [-1] * 4)
        sink.write(np.ones((4, 4), np.float32), NAMES, [-1] * 4)
    assert (tmp_path / name).read_bytes() == before
    assert os.listdir(tmp_path) == [name]  # noqa: PTH208


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_files_of_others_are_told_apart(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa

    values = np.ones((4, 3), np.float32)
    assert is_ours(write(tmp_path / f"ours{suffix}", values))
    other = tmp_path / f"other{suffix}"
    if suffix == ".npz":
        np.savez(other, features=values)
    else:
        pq.write_table(pa.table({"features": [1.0]}), other)
    good = (tmp_path / f"ours{suffix}").read_bytes()
    for content in (
        other.read_bytes(),
        b"",
        b"PAR1",
        b"PK\3\4",
        good[: len(good) // 2],
        b"x" * 40 + b"\xff" * 4 + b"PAR1",
    ):
        other.write_bytes(content)
        assert not is_ours(other)
        if content:
            with pytest.raises(OutputError, match="not a file of features that was written here"):
                check_output(other, FEATURES)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pyarrow" else found(name, *rest)
    )
    assert why_no_file(tmp_path / "f.npz") is None
    with pytest.raises(ValueError, match=r"parquet needs pyarrow; install with: pip install pyarrow, or write \.npz"):
        write(tmp_path / "f.PARQUET", np.ones((4, 3), np.float32))
    assert not list(tmp_path.iterdir())

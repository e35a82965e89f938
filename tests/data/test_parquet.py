"""Parquet files as sources of images: of one and of many, damaged, odd, of groups too large to be read."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from convnextv2.data import DataError, build_finetune_datasets, build_pretrain_dataset, open_source, parquet, spool
from convnextv2.data.decoding import UnreadableImageError
from convnextv2.data.shard_writing import write_shards
from convnextv2.data.tar_index import cache_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder("spool")


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def write(path: Path, columns: Mapping[str, Any], rows: int = 2, names: list[str] | None = None) -> Path:
    """A table in groups of so many rows, with Hugging Face's note about the classes where they have names."""
    table = pa.table(dict(columns))
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def images(*values: int | None) -> list[bytes | None]:
    return [None if value is None else png(value) for value in values]


def structs(*values: int) -> list[dict[str, Any]]:
    return [{"bytes": png(value), "path": f"{value}.png"} for value in values]


def reds(opened: Any) -> list[int]:
    """The red of each image."""
    source = opened.train.by_number
    return [int(np.asarray(source.load(number))[0, 0, 0]) for number in range(len(source))]


@pytest.mark.parametrize("make", [images, structs])
def test_rows_are_images_in_their_order(tmp_path: Path, make: Callable[..., Any]) -> None:
    path = write(tmp_path / "a.parquet", {"image": make(*range(7)), "label": [0, 1, 1, 0, 1, 0, 0]}, 3, ["cat", "dog"])
    opened = open_source(path, labelled=True)
    assert reds(opened) == [*range(7)]
    assert [opened.train.by_number.load(number).getpixel((0, 0))[0] for number in (6, 0, 3)] == [6, 0, 3]  # type: ignore[union-attr, index]
    assert (opened.train.labels, opened.classes) == ([0, 1, 1, 0, 1, 0, 0], ["cat", "dog"])
    assert opened.train.images.name(4) == f"{path}: row 4"  # type: ignore[union-attr]
    train, val = build_finetune_datasets(path, (8, 8))
    assert (len(train), len(val)) == (5, 2)


def test_files_of_a_folder_a_pattern_and_a_range_are_one_set(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"set/part-{number}.parquet", {"image": images(2 * number, 2 * number + 1)})
    for spec in ("set", "set/*.parquet", "set/part-{0..2}.parquet"):
        assert reds(open_source(f"{tmp_path}/{spec}")) == [*range(6)]
    (tmp_path / "one").mkdir()
    (tmp_path / "set/part-1.parquet").rename(tmp_path / "one/x.PARQUET")
    assert reds(open_source(tmp_path / "one")) == [2, 3]
    opened = open_source(f"{tmp_path}/set/part-{{0..2}}.parquet")
    assert reds(opened) == [0, 1, 4, 5]
    assert [(path.name, reason[:14]) for path, reason in opened.train.skipped] == [("part-1.parquet", "Failed to open")]
    with pytest.raises(DataError, match="no file fits this pattern"):
        open_source(f"{tmp_path}/none/*.parquet")


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", "data/test-0.parquet"),
        ("train.parquet", "val.parquet", "other.parquet"),
        ("train/0.parquet", "val/0.parquet", None),
    ],
)
def test_splits_are_parts(tmp_path: Path, names: tuple[str, str, str | None]) -> None:
    for number, name in enumerate(names):
        if name is not None:
            write(tmp_path / "set" / name, {"image": images(number, number), "label": ["b", "a" if number else "c"]})
    opened = open_source(tmp_path / "set", labelled=True)
    assert reds(opened) == [0, 0]
    assert opened.classes == ["a", "b", "c"]  # of both parts
    assert opened.val is not None
    assert (opened.train.labels, opened.val.labels) == ([1, 2], [1, 0])
    assert [path.name for path, _ in opened.train.skipped] == ([Path(names[2]).name] if names[2] else [])
    assert open_source(tmp_path / "set").val is None


def test_a_folder_of_images_with_a_table_beside_them_is_a_folder_of_images(image_folder: Any) -> None:
    root = image_folder({"a": 3})
    write(root / "metadata.parquet", {"file_name": ["a/000.png"]})
    assert len(open_source(root).train.by_number) == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": ["a", "b"], "label": [0, 1]},
            r"no column of images; its columns are: image \(string\), label \(int64",
        ),
        ({"x": [b"", b""], "y": [b"", b""]}, "several columns of bytes and none is called `image`"),
        ({"image": [png(), png()]}, "has no labels; expected a column `label`"),
        ({"image": [png(), png()], "label": [0.5, 1.0]}, "has no labels"),
        ({"image": [png(), png()], "label": [0, 10**9]}, "holds the label 1000000000"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "found no image in 1 parquet file"),
        ({}, "no column of images; its columns are: none"),
    ],
)
def test_one_line_for_what_cannot_be_used(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        open_source(write(tmp_path / "a.parquet", columns), labelled=True)
    assert "\n" not in str(error.value)


def test_names_that_the_metadata_do_not_have_are_no_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": images(0, 1), "label": [0, 2]}, names=["cat", "dog"])
    with pytest.raises(DataError, match="holds the label 2; expected numbers of its 2 classes"):
        open_source(path, labelled=True)
    odd = pa.table({"image": images(0, 1), "label": [0, 1]})
    for note in (b"", b"[", b"[1]", b'{"info": {"features": {"label": {"names": 3, "_type": "ClassLabel"}}}}', b"\xff"):
        pq.write_table(odd.replace_schema_metadata({"huggingface": note}), path)
        assert open_source(path, labelled=True).classes == ["0", "1"]


def test_labels_may_be_missing_and_of_any_width(tmp_path: Path) -> None:
    for number, labels in enumerate(
        (pa.array([1, None, 0], pa.int8()), pa.array([1, -1, 0]), pa.array(["b", None, "a"]).dictionary_encode())
    ):
        path = write(tmp_path / f"{number}.parquet", {"image": images(0, 1, 2), "label": labels})
        opened = open_source(path, labelled=True)
        assert (reds(opened), opened.train.labels) == ([0, 2], [1, 0])
        assert [(path.name, reason) for path, reason in opened.train.skipped] == [
            (f"{number}.parquet: row 1", "has no label")
        ]
        assert open_source(path).train.labels is None
        assert reds(open_source(path)) == [0, 1, 2]


def test_cells_that_are_no_images_cost_themselves(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(png(9))
    cells = [
        {"bytes": png(0), "path": None},
        None,
        {"bytes": None, "path": None},
        {"bytes": b"no image", "path": "x.png"},
        {"bytes": b"", "path": "x.png"},
        {"bytes": None, "path": "there.png"},
        {"bytes": None, "path": "gone.png"},
        {"bytes": None, "path": "/dev/zero"},
    ]
    source = open_source(write(tmp_path / "a.parquet", {"image": cells})).train.by_number
    assert np.asarray(source.load(5))[0, 0, 0] == 9
    for number, reason in ((1, "is null"), (2, "is null"), (3, "not an image"), (4, "empty file"),
                           (6, "names the file gone.png, which is not there"), (7, "which is not there")):  # fmt: skip
        with pytest.raises(UnreadableImageError, match=reason):
            source.load(number)
    dataset = build_pretrain_dataset(tmp_path / "a.parquet", (8, 8))
    assert all(dataset[number].isfinite().all() for number in range(8))
    assert dataset.replaced == [1, 2, 3, 4, 6, 7]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_a_truncated_file_is_left_out_and_told(tmp_path: Path, share: float) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"set/{name}.parquet", {"image": images(*range(8))})
    content = (tmp_path / "set/a.parquet").read_bytes()
    (tmp_path / "set/a.parquet").write_bytes(content[: int(share * len(content))])
    opened = open_source(tmp_path / "set")
    assert reds(opened) == [*range(8)]
    assert [path.name for path, _ in opened.train.skipped] == ["a.parquet"]
    (tmp_path / "set/b.parquet").unlink()
    with pytest.raises(DataError, match=r"found no image in 1 parquet file\(s\); .*a\.parquet: "):
        open_source(tmp_path / "set")


def test_damage_and_changes_after_it_was_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": images(*range(8))})
    source = open_source(path).train.by_number
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 6] = bytes(len(content) // 6 - 4)
    path.write_bytes(content)
    parquet._groups = parquet._Groups()
    with pytest.raises(UnreadableImageError, match="its row group cannot be read"):
        source.load(0)
    assert np.asarray(source.load(7))[0, 0, 0] == 7
    write(path, {"image": images(*range(50, 58))})
    assert reds(open_source(path)) == [*range(50, 58)]  # nothing that was kept of the other file
    path.unlink()
    parquet._groups = parquet._Groups()
    with pytest.raises(UnreadableImageError, match="its row group cannot be read"):
        source.load(0)


def test_other_columns_in_another_file_are_told(tmp_path: Path) -> None:
    write(tmp_path / "set/a.parquet", {"image": images(0), "label": [0]})
    write(tmp_path / "set/b.parquet", {"image": images(1), "label": ["x"]})
    write(tmp_path / "set/c.parquet", {"picture": ["x"], "label": [1]})
    opened = open_source(tmp_path / "set", labelled=True)
    assert reds(opened) == [0]
    told = {path.name: reason for path, reason in opened.train.skipped}
    assert "are not those of the first file" in told["b.parquet"]
    assert "no column of images" in told["c.parquet"]


def test_large_groups_are_rewritten_once_in_small_ones(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.parquet", {"image": structs(*range(40)), "label": [n % 2 for n in range(40)]}, 40)
    monkeypatch.setattr(parquet, "MOST_GROUP", 500)
    monkeypatch.setattr(parquet, "GROUP", 500)
    for _ in range(2):
        opened = open_source(path, labelled=True)
        assert reds(opened) == [*range(40)]
        assert opened.train.labels == [n % 2 for n in range(40)]
    assert opened.train.images.name(39) == f"{path}: row 39"  # type: ignore[union-attr]
    (kept,) = cache.glob("*.parquet")
    assert pq.ParquetFile(kept).num_row_groups > 4
    assert caplog.text.count("is written once into") == 1
    write(path, {"image": structs(*range(41))}, 41)
    assert len(open_source(path).train.by_number) == 41
    assert len([*cache.glob("*.parquet")]) == 2
    (tmp_path / "cache/sparse-fcmae").rename(tmp_path / "cache/other")
    (tmp_path / "cache/sparse-fcmae").write_text("no folder")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be kept in .*sparse-fcmae/spool: Not a directory"):
        open_source(path)


def test_a_full_disk_is_told(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"image": images(*range(9))}, 9)
    monkeypatch.setattr(parquet, "MOST_GROUP", 5)
    monkeypatch.setattr(spool, "LEAST_FREE", 2**62)
    with pytest.raises(DataError, match="the disk is full: free some, or let XDG_CACHE_HOME name another"):
        open_source(path)
    assert not [*cache.glob("*.parquet")]


def test_what_a_process_keeps_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"image": images(*range(20))}, 4)
    monkeypatch.setattr(parquet, "_groups", parquet._Groups())
    monkeypatch.setattr(parquet, "KEPT_BYTES", 900)
    opened = open_source(path)
    for _ in range(2):
        assert reds(opened) == [*range(20)]
        kept = parquet._groups._kept.values()
        assert sum(cells.nbytes for cells in kept) <= 900 or len(kept) == 1


def test_an_address(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": images(*range(5)), "label": [0, 1, 0, 1, 0]})
    fsspec.filesystem("memory").pipe("/tables/a.parquet", path.read_bytes())
    opened = open_source("memory://tables/{a..a}.parquet".replace("{a..a}", "a"), labelled=True)
    assert reds(opened) == [*range(5)]
    with pytest.raises(DataError, match="found no image in 1 parquet file"):
        open_source("memory://tables/none.parquet")


def test_other_processes_read_by_themselves(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "a.parquet", {"image": images(*range(9))})).train.by_number
    source.load(0)
    child = os.fork()
    if child == 0:
        os._exit(int(np.asarray(source.load(8))[0, 0, 0]))  # type: ignore[arg-type]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 8
    assert np.asarray(source.load(5))[0, 0, 0] == 5


def test_shards_are_made_of_them(tmp_path: Path, script: Any) -> None:
    cells = [{"bytes": png(value), "path": None} for value in range(5)]
    cells[2] = {"bytes": None, "path": None}
    columns = {"image": cells, "label": ["b", "a", "a", "b", "a"]}
    write(tmp_path / "set/train-0.parquet", columns)
    write(tmp_path / "set/validation-0.parquet", columns)
    done = script("make_shards", tmp_path / "set", tmp_path / "shards", "--samples", 3)
    assert (done.status, "8 images in 4 shard(s)" in done.out) == (0, True)
    assert "row 2: is null" in done.err
    opened = open_source(tmp_path / "shards", labelled=True)
    assert (reds(opened), opened.train.labels, opened.classes) == ([0, 1, 3, 4], [1, 0, 1, 0], ["a", "b"])
    assert opened.val is not None
    write(tmp_path / "null.parquet", {"image": [None, None]} | {"image": pa.array([None, None], pa.binary())})
    with pytest.raises(DataError, match="none of its images can be had; the first is null"):
        write_shards(tmp_path / "null.parquet", tmp_path / "none")
    assert not (tmp_path / "none").exists()

"""Lists of files as sources of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from convnextv2.data import DataError, FileSource, build_finetune_datasets, build_pretrain_dataset, open_source
from convnextv2.data.decoding import UnreadableImageError

Folder = Callable[..., Path]


@pytest.fixture
def photos(image_folder: Folder) -> Path:
    return image_folder({"blue": 3, "red": 3}, name="photos")


def test_a_file_a_line(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"x")
    lines = ["photos/red/002.png", "", str(photos / "blue/000.png"), "photos/none.png", "photos/broken.png", "photos"]
    (tmp_path / "list.txt").write_text("\ufeff" + "\r\n".join(lines))
    opened = open_source(tmp_path / "list.txt")
    assert isinstance(opened.train.images, FileSource)
    assert [path.name for path in opened.train.images.paths] == ["002.png", "000.png"]  # in the list's order
    assert opened.train.labels is None
    told = {path.name: reason for path, reason in opened.train.skipped}
    assert told.keys() == {"none.png", "broken.png", "photos"}
    assert told["none.png"] == "no such file"
    assert len(build_pretrain_dataset(tmp_path / "list.txt", (16, 16))) == 2
    with pytest.raises(DataError, match="has no labels; expected a column `label`"):
        open_source(tmp_path / "list.txt", labelled=True)


@pytest.mark.parametrize(
    ("header", "order"),
    [("file,label", (0, 1)), ("label,path", (1, 0)), ("", (0, 1)), ('note,"Image", class ', (None, 0, 1))],
)
def test_labels_in_columns(photos: Path, header: str, order: tuple[int | None, ...]) -> None:
    rows = [header] if header else []
    for label in ("red", "blue"):
        for number in range(3):
            cells = (f"{label}/{number:03d}.png", label)
            rows.append(",".join('"a, b"' if place is None else cells[place] for place in order))
    (photos / "list.CSV").write_text("\n".join(rows))
    opened = open_source(photos / "list.CSV", labelled=True)
    assert opened.classes == ["blue", "red"]
    assert opened.train.labels == [1, 1, 1, 0, 0, 0]
    assert opened.val is None


def test_parts_in_a_column(photos: Path) -> None:
    rows = [f"{label}/{number:03d}.png,{label},{'val' if number == 2 else 'Train'}" for label in ("red", "blue")
            for number in range(3)]  # fmt: skip
    (photos / "list.csv").write_text("\n".join(["file,label,split", *rows]))
    train, val = build_finetune_datasets(photos / "list.csv", (16, 16))
    assert (len(train), len(val), list(val.labels or ())) == (4, 2, [1, 0])
    assert len(build_pretrain_dataset(photos / "list.csv", (16, 16))) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lists no usable image"),
        (b"nowhere.png,red\n", r"lists no usable image to train on; .*nowhere\.png: no such file"),
        (b"a,b,c\nd,e,f\n", "has 3 columns and none is called `file`"),
        (b"file,label\nx.png\n", r"row 1 has 1 column\(s\): x\.png"),
        (b"file,label\nx.png,\n", "row 1 has no label"),
        (b"file,label\n,red\n", "row 1 has no file"),
        (b"file,label,part\nx.png,red,later\n", "row 1 has the part 'later'"),
        (b'file,label\n"x.png,red\n', "expected comma-separated columns"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
        (b"file,label,part\nred/000.png,red,val\n", "lists no usable image to train on"),
    ],
)
def test_one_line_for_what_is_no_list(photos: Path, content: bytes, message: str) -> None:
    (photos / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        open_source(photos / "list.csv", labelled=True)
    assert "\n" not in str(error.value)


def test_addresses_in_a_list(photos: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/pictures/a.png", (photos / "red/001.png").read_bytes())
    (photos / "list.csv").write_text("memory://pictures/a.png,1\nred/000.png,0\nmemory://pictures/none.png,1\n")
    opened = open_source(photos / "list.csv", labelled=True)
    images = opened.train.by_number
    expected = open_source(photos).train.by_number
    np.testing.assert_array_equal(np.asarray(images.load(0)), np.asarray(expected.load(4)))
    np.testing.assert_array_equal(np.asarray(images.load(1)), np.asarray(expected.load(3)))
    with pytest.raises(UnreadableImageError, match="cannot be fetched"):
        images.load(2)
    assert build_pretrain_dataset(photos / "list.csv", (8, 8))[2].isfinite().all()


def test_classes_are_those_of_images_that_can_be_had(photos: Path) -> None:
    rows = ["file,label", "red/000.png,red", "blue/000.png,blue", "none.png,ghost"]
    (photos / "list.csv").write_text("\n".join(rows))
    opened = open_source(photos / "list.csv", labelled=True)
    assert (opened.classes, opened.train.labels) == (["blue", "red"], [1, 0])
    (photos / "list.csv").write_text("\n".join(["image_path,label", *rows[1:]]))
    with pytest.raises(DataError, match="has 2 columns and none is called `file`"):
        open_source(photos / "list.csv", labelled=True)

"""All images of a folder with the names of their folders, and of other sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convnextv2.data.decoding import Wanted
from convnextv2.data.shard_writing import write_shards
from convnextv2.data.sources import DataError
from convnextv2.data.transforms import image_transform
from convnextv2.data.whole import build_whole_dataset

THREE = (0.5,) * 3, (0.25,) * 3
Folder = Callable[..., Path]


def whole(data: object, **options: Any) -> Any:
    return build_whole_dataset(data, (32, 32), 3, *THREE, **options)


def test_class_folders_are_labels_and_names_are_relative(image_folder: Folder) -> None:
    root = image_folder({"b": 2, "a": 1, "": 1})
    (root / "b" / "deep").mkdir()
    (root / "b" / "000.png").rename(root / "b" / "deep" / "x.png")
    (root / "b" / "notes.txt").write_text("no image")
    (root / "a" / "bad.jpg").write_text("no image")
    dataset = whole(root)
    assert list(dataset.names) == ["000.png", "a/000.png", "a/bad.jpg", "b/001.png", "b/deep/x.png"]
    assert dataset.labels == [-1, 0, 0, 1, 1]
    assert dataset.classes == ["a", "b"]
    assert dataset.data == str(root)
    assert [path.name for path, _ in dataset.skipped] == ["notes.txt"]
    image, number, reason = dataset[4]
    assert (number, reason) == (4, "")
    expected = image_transform((32, 32), *THREE)(Image.open(root / "b" / "deep" / "x.png"))
    assert torch.equal(image, expected)
    assert dataset[2][2]


def test_train_and_val_are_no_classes(image_folder: Folder) -> None:
    root = image_folder({"x": 1}, name="x").parent / "photos"
    for part, names in (("train", ("rose", "daisy")), ("val", ("rose",)), ("test", ("daisy",)), ("more", ("rose",))):
        image_folder(dict.fromkeys(names, 1), name=f"photos/{part}")
    dataset = whole(root)
    assert list(dataset.names) == [
        "more/rose/000.png", "test/daisy/000.png", "train/daisy/000.png", "train/rose/000.png", "val/rose/000.png",
    ]  # fmt: skip
    assert [dataset.classes[label] for label in dataset.labels] == ["more", "daisy", "daisy", "rose", "rose"]
    assert whole(root / "train").classes == ["daisy", "rose"]


def test_a_single_file_and_images_without_folders(image_folder: Folder) -> None:
    root = image_folder({"": 3})
    dataset = whole(root)
    assert (list(dataset.labels), list(dataset.classes)) == ([-1] * 3, [])
    dataset = whole(root / "001.png")
    assert (list(dataset.names), list(dataset.labels)) == (["001.png"], [-1])


def test_other_sources() -> None:
    dataset = build_whole_dataset("digits", (32, 32), 1, (0.5,), (0.5,))
    assert len(dataset) == len(dataset.names) == len(dataset.labels) == 1797
    assert len(set(dataset.names)) == 1797
    assert list(dataset.classes) == [str(digit) for digit in range(10)]
    assert dataset[3][0].shape == (1, 32, 32)


def test_what_is_refused(tmp_path: Path, image_folder: Folder) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        whole(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no images are named"):
        whole("")
    with pytest.raises(DataError, match="looked for image files and found none"):
        (tmp_path / "empty").mkdir()
        whole(tmp_path / "empty")
    dataset = whole(image_folder({"": 1}), wanted=Wanted(max_pixels=100))
    assert "max_pixels" in dataset[0][2]


@pytest.mark.parametrize("source", ["list", "shards"])
def test_images_of_more_than_8_bits_in_other_sources(tmp_path: Path, source: str) -> None:
    (tmp_path / "deep" / "a").mkdir(parents=True)
    for number in range(2):
        values = np.full((20, 24), 3000 + 100 * number, np.uint16)
        Image.fromarray(values).save(tmp_path / "deep" / "a" / f"{number}.png")
    if source == "list":
        (tmp_path / "list.txt").write_text("deep/a/0.png\ndeep/a/1.png")
        data = tmp_path / "list.txt"
    else:
        data = tmp_path / "shards"
        write_shards(tmp_path / "deep", data, in_chans=1)
    found, folder = (
        build_whole_dataset(one, (16, 16), 1, (3000.0,), (100.0,), Wanted(pixels="native"))
        for one in (data, tmp_path / "deep")
    )
    assert found[1][2] == ""
    assert torch.equal(found[1][0], folder[1][0])
    assert found[1][0].mean() == pytest.approx(1.0, abs=1e-4)

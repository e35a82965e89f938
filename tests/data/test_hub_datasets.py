"""Data sets of Hugging Face: folders that its library saved, and names of its hub, without one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from data_helpers import Folder
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from convnextv2.data import (
    DataError,
    build_finetune_datasets,
    build_pretrain_dataset,
    hub_datasets,
    open_source,
    tables,
)
from convnextv2.data.shard_writing import write_shards


@pytest.fixture
def photos(image_folder: Folder) -> Path:
    return image_folder({"blue": 4, "red": 3}, name="photos")


def rows_of(photos: Path, labels: list[int] | None = None) -> Dataset:
    """The images of the folder, their files in the rows."""
    files = sorted(photos.glob("*/*.png"))
    features = Features({"image": Image(), "label": ClassLabel(names=["blue", "red"])})
    cells = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    return Dataset.from_dict({"image": cells, "label": labels or [int("red" in str(f)) for f in files]}, features)


def same_images(found: Any, photos: Path) -> None:
    expected = open_source(photos).train.by_number
    assert len(found) == len(expected)
    for number in range(len(expected)):
        np.testing.assert_array_equal(np.asarray(found.load(number)), np.asarray(expected.load(number)))


def test_a_saved_folder_is_what_the_files_are(photos: Path, tmp_path: Path) -> None:
    rows_of(photos).save_to_disk(tmp_path / "saved", num_shards=3)
    opened = open_source(tmp_path / "saved", labelled=True)
    same_images(opened.train.by_number, photos)
    assert (opened.classes, opened.train.labels) == (["blue", "red"], [0] * 4 + [1] * 3)
    assert opened.train.images.name(6) == f"{tmp_path / 'saved'}: row 6"  # type: ignore[union-attr]
    with pytest.raises(IndexError):
        opened.train.by_number.load(7)
    folder, saved = (build_pretrain_dataset(data, (16, 16)) for data in (photos, tmp_path / "saved"))
    assert all(folder[number].equal(saved[number]) for number in (6, 0, 3))
    write_shards(tmp_path / "saved", tmp_path / "shards")
    same_images(open_source(tmp_path / "shards").train.by_number, photos)


def test_rows_that_were_chosen_and_shuffled_are_read_so(photos: Path, tmp_path: Path) -> None:
    chosen = rows_of(photos).select([5, 1, 3])
    chosen.save_to_disk(tmp_path / "saved")
    opened, expected = open_source(tmp_path / "saved").train, open_source(photos).train
    for number, place in enumerate((5, 1, 3)):
        pair = (np.asarray(part.by_number.load(at)) for part, at in ((opened, number), (expected, place)))
        np.testing.assert_array_equal(*pair)
    assert list(opened.labels or ()) == [1, 0, 0]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_splits_are_parts(photos: Path, tmp_path: Path, name: str) -> None:
    rows = rows_of(photos)
    splits = {"test": rows.select([0]), "train": rows, name: rows.select([6, 0])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    train, val = build_finetune_datasets(tmp_path / "saved", (8, 8))
    assert (len(train), list(val.labels or ())) == (7, [1, 0])
    assert val.part.images.name(1) == f"{tmp_path / 'saved'}, {name}: row 1"  # type: ignore[union-attr]
    assert len(build_pretrain_dataset(tmp_path / "saved", (8, 8))) == 7
    assert len(build_pretrain_dataset(tmp_path / "saved/test", (8, 8))) == 1


def test_one_line_for_what_cannot_be_used(photos: Path, tmp_path: Path) -> None:
    def refused(found: Any, message: str) -> None:
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        found.save_to_disk(tmp_path / "saved")
        with pytest.raises(DataError, match=message) as error:
            open_source(tmp_path / "saved", labelled=True)
        assert "\n" not in str(error.value)

    rows = rows_of(photos)
    refused(DatasetDict({"a": rows, "b": rows}), "none of its splits is called train: a, b; name one")
    refused(DatasetDict({"train": rows, "val": rows.remove_columns("label")}), "its splits differ in their columns")
    refused(rows.remove_columns("image"), r"no column of images; its columns are: label \(int64\)")
    refused(rows.remove_columns("label"), "has no labels; expected a column `label`")
    refused(rows.select([]), r"cannot be loaded \(\w+: ")  # which the library writes and does not read
    rows.save_to_disk(tmp_path / "cut")
    (file,) = (tmp_path / "cut").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(DataError, match=r"cut: cannot be loaded \(\w+: "):
        open_source(tmp_path / "cut")
    (tmp_path / "cut/dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=r"cut: cannot be loaded \(\w+: "):
        open_source(tmp_path / "cut")


def test_labels_without_a_class_and_cells_without_an_image(photos: Path, tmp_path: Path) -> None:
    rows = rows_of(photos, [0, -1, 1, 0, 1, 0, 1]).to_dict()
    rows["image"][3] = None
    rows["image"][4] = {"bytes": b"x", "path": None}
    features = Features({"image": Image(), "label": ClassLabel(names=["blue", "red"])})
    Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    opened = open_source(tmp_path / "saved", labelled=True)
    assert opened.train.labels == [0, 1, 0, 1, 0, 1]
    assert [reason for _, reason in opened.train.skipped] == ["has no label"]
    dataset = build_pretrain_dataset(tmp_path / "saved", (8, 8))
    assert all(dataset[number].isfinite().all() for number in range(7))
    assert dataset.replaced == [3, 4]
    names = Dataset.from_dict(
        {"picture": rows["image"][:2], "class": ["x", "a"]}, Features({"picture": Image(), "class": Value("string")})
    )
    names.save_to_disk(tmp_path / "named")
    assert open_source(tmp_path / "named", labelled=True).classes == ["a", "x"]


@pytest.mark.parametrize(
    ("spec", "name", "config", "split", "revision"),
    [
        ("hf://org/name", "org/name", None, None, None),
        ("hf://datasets/org/na.me-1", "org/na.me-1", None, None, None),
        ("hf://org/name/plain:train", "org/name", "plain", "train", None),
        ("hf://org/name:train[:10%]", "org/name", None, "train[:10%]", None),
        ("hf://org/name/plain?split=train+test", "org/name", "plain", "train+test", None),
        ("hf://org/name@v1.0/plain", "org/name", "plain", None, "v1.0"),
        ("hf://org/name@abc:validation", "org/name", None, "validation", "abc"),
    ],
)
def test_names_of_the_hub(
    photos: Path, monkeypatch: pytest.MonkeyPatch, spec: str, name: str, config: Any, split: Any, revision: Any
) -> None:
    asked, rows = list[Any](), rows_of(photos)

    def load(*given: Any, **more: Any) -> Any:
        asked.append((given, more))
        return rows if split else DatasetDict({"train": rows, "validation": rows.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    opened = open_source(spec, labelled=True)
    assert asked == [((name, config), {"split": split, "revision": revision})]
    same_images(opened.train.by_number, photos)
    assert (opened.val is None) == bool(split)
    rows = rows.select([])
    with pytest.raises(DataError, match="found no image; it has no rows"):
        open_source(spec)


@pytest.mark.parametrize("spec", ["hf://", "hf://a b", "hf://org/name/config/more", "hf://org/name?revision=3"])
def test_what_is_no_name_of_the_hub_is_told(spec: str) -> None:
    with pytest.raises(DataError, match="expected a data set of Hugging Face, as hf://ORG/NAME"):
        open_source(spec)


def test_without_the_hub_and_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot be had from the hub, nor from what was fetched before") as error:
        open_source("hf://nobody/nothing")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs datasets: pip install 'sparse-fcmae\[hf\]'"):
        open_source("hf://org/name")
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'sparse-fcmae\[parquet\]'"):
        open_source("a.parquet")


def test_other_addresses_of_the_hub_are_files_of_it() -> None:
    kind = hub_datasets.SOURCE_KIND
    assert not kind.claims("hf://datasets/org/name/a-{000..003}.tar")
    assert not kind.claims("hf://datasets/org/name/data/train-0.parquet")
    assert kind.claims("hf://org/name")

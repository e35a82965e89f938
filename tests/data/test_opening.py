import csv
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import Folder

import convnextv2.data
from convnextv2.data import (
    Augmentation,
    DataError,
    OpenedSource,
    Part,
    Wanted,
    build_finetune_datasets,
    build_pretrain_dataset,
    open_source,
    opening,
    register_kind,
)
from convnextv2.training.pretraining import PretrainOptions

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def example() -> str:
    """The kind of source that the guide defines."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (block,) = [block for block in blocks if "SOURCE_KIND" in block]
    return block


@pytest.fixture
def table(image_folder: Folder) -> Path:
    """A table of 10 red, 5 green images in one flat folder."""
    root = image_folder({"red": 10, "green": 5})
    lines = [(f"{path.parent.name}_{path.name}", path.parent.name) for path in sorted(root.glob("*/*.png"))]
    for name, label in lines:
        (root / label / name.removeprefix(f"{label}_")).rename(root / name)
    with (root / "table.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("file", "label"), *lines])
    return root / "table.tsv"


@pytest.fixture
def table_kind(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(opening, "_registered", [])
    names: dict[str, Any] = {}
    exec(compile(example(), PAGE.name, "exec"), names)
    register_kind(names["SOURCE_KIND"])
    return names["SOURCE_KIND"]


def check_table(table: Path) -> None:
    opened = open_source(table)
    assert (len(opened.train.by_number), opened.classes) == (15, ["green", "red"])
    train, val = build_finetune_datasets(table, (32, 32), seed=2)
    assert (len(train), len(val), val.classes) == (12, 3, ["green", "red"])
    assert sorted(val.labels or []) == [0, 1, 1]
    for image, label in (val[0], val[-1]):  # as green or red as they are called
        assert (
            image.mean((1, 2)).argmax() == (1, 0)[label]
        )  # channel: the images are as green or red as they are called
    assert train.description == f"{table}, training part: 12 images of 2 classes"
    pretrain = build_pretrain_dataset(table, (32, 32), seed=2)
    assert torch.equal(pretrain.examples(12), train.examples(12))  # what is validated on is held out
    PretrainOptions(data=str(table), output="x").check()


def test_the_kind_of_the_guide(table: Path, table_kind: Any) -> None:
    check_table(table)
    table.write_text("file\tlabel\n")
    with pytest.raises(DataError, match="a line for every image"):
        build_pretrain_dataset(table, (32, 32))
    with pytest.raises(ValueError, match=r"`data` nowhere\.tsv: no such folder; expected a folder .* or a table"):
        PretrainOptions(data="nowhere.tsv", output="x").check()


def test_a_kind_is_one_file_in_the_package(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError,
        match=r"not a folder; expected a folder of images or one scene .* or shards, .* or a list .* or 'digits'",
    ):
        open_source(table)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "guide_table.py").write_text(example())
    monkeypatch.setattr(convnextv2.data, "__path__", [*convnextv2.data.__path__, str(tmp_path / "more")])
    try:
        check_table(table)
    finally:
        del sys.modules["convnextv2.data.guide_table"], convnextv2.data.guide_table  # type: ignore[attr-defined]
    shutil.rmtree(tmp_path / "more")
    with pytest.raises(DataError, match="not a folder"):
        open_source(table)


def test_a_folder_is_what_no_other_kind_claims(image_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(image_folder({"": 2}, "work/digits").parent)
    assert len(open_source("digits").train.by_number) == 1797
    assert len(open_source("./digits").train.by_number) == 2


class NoiseKind:
    """Images in memory, with wishes of their own."""

    expects = "noise"

    def __init__(self, images: Any, **wishes: Any) -> None:
        self.opened = OpenedSource("noise", Part(images, wishes.pop("labels", None)), **wishes)

    def claims(self, spec: str) -> bool:
        return spec == "noise"

    def open(self, spec: str, **_: Any) -> OpenedSource:
        return self.opened


class Noise:
    """Five 8×8 arrays of five channels."""

    def __len__(self) -> int:
        return 5

    def load(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).random((8, 8, 5), dtype=np.float32)


def test_wishes_of_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"pretrain": (1.0, 1.0), "finetune": (1.0, 1.0)}
    monkeypatch.setattr(opening, "_registered", [])
    statistics = (0.25,) * 5, (0.5,) * 5
    register_kind(NoiseKind(Noise(), statistics=statistics, crop_scale=whole, hflip=1.0))
    dataset = build_pretrain_dataset("noise", (8, 8), 5)
    assert (dataset.mean, dataset.std) == statistics
    expected = (torch.from_numpy(Noise().load(3)).permute(2, 0, 1) - 0.25) / 0.5
    torch.testing.assert_close(dataset.examples(5)[3], expected)
    torch.testing.assert_close(dataset[3], expected.flip(2))  # all of the image, flipped
    kept = build_pretrain_dataset("noise", (8, 8), 5, augmentation=Augmentation(hflip=0), mean=(0,) * 5, std=(1,) * 5)
    torch.testing.assert_close(kept[3], expected * 0.5 + 0.25)  # the caller's wishes come first
    with pytest.raises(DataError, match="noise: has no labels"):
        build_finetune_datasets("noise", (8, 8), 5)
    register_kind(NoiseKind(Noise(), labels=[0] * 5))
    with pytest.raises(DataError, match="at least two classes"):
        build_finetune_datasets("noise", (8, 8), 5)


class Stream:
    """Images that can only be read in order."""

    def read(self, share: int, shares: int) -> Iterator[tuple[int, np.ndarray, int | None]]:
        yield from ((number, Noise().load(number), None) for number in range(share, 5, shares))


def test_training_refuses_what_is_read_in_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_registered", [])
    register_kind(NoiseKind(Stream(), labels=[0, 1, 0, 1, 0], classes=["a", "b"]))
    for build in (build_pretrain_dataset, build_finetune_datasets):
        with pytest.raises(DataError, match="read in sequence"):
            build("noise", (8, 8), 5)


def test_a_kind_from_before_there_was_decoding(table: Path, table_kind: Any) -> None:
    opened = table_kind.open

    class OldKind(type(table_kind)):  # type: ignore[misc]
        def open(self, spec: str, *, in_chans: int, img_size: tuple[int, int], labelled: bool) -> OpenedSource:
            return opened(spec, in_chans=in_chans, img_size=img_size, labelled=labelled, wanted=Wanted())

    assert open_source(table, wanted=Wanted(10_000)).train.images.wanted == Wanted(10_000, pixels="photo")
    register_kind(OldKind())
    assert len(open_source(table).train.by_number) == 15
    with pytest.raises(ValueError, match=r"^Wanted\(max_pixels=10000\) cannot be told to .*OldKind\.open, "):
        open_source(table, wanted=Wanted(10_000))

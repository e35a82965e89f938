"""Data that breaks while a run reads it: told every epoch, and too much of it ends the run."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from convnextv2.data import DataError, build_finetune_datasets
from convnextv2.data.names import name_of
from convnextv2.evaluation.prediction import Prediction, right_by_folder
from convnextv2.training.bad_data import BadData
from convnextv2.training.run import Run

SIZES = "--depths 1 1 1 1 --dims 8 8 16 16 --img-size 32 --patch-size 8 --batch-size 8"
COMMON = [*SIZES.split(" "), "--device", "cpu", "--epochs", "3"]
OPTIONS = [*COMMON, "--decoder-dim", "16", "--backend", "reference", "--reconstruct-every", "0"]


def breaks(folder: Path, keep: int) -> None:
    """Of all but ``keep`` images half are gone, half are text."""
    for number, path in enumerate(sorted(folder.rglob("*.png"))[keep:]):
        path.unlink()
        if number % 2:
            path.write_text("no image")


@pytest.fixture
def break_after_first_epoch(monkeypatch: pytest.MonkeyPatch) -> Any:
    def arrange(folder: Path, keep: int) -> None:
        train = Run.train

        def and_break(self: Run, epoch: int) -> Any:
            if epoch == 1:
                breaks(folder, keep)
            return train(self, epoch)

        monkeypatch.setattr(Run, "train", and_break)

    return arrange


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_whose_files_vanish(
    script: Any, image_folder: Any, tmp_path: Path, break_after_first_epoch: Any, workers: int
) -> None:
    root = image_folder({"": 64})
    shutil.copytree(root, tmp_path / "whole")
    break_after_first_epoch(root, 4)
    arguments = "--data", root, "--workers", workers, *OPTIONS
    result = script("pretrain", *arguments, "--output", tmp_path / "stopped")
    assert result.status == 2
    error = result.err.splitlines()[-1]
    assert re.match(r"error: stopped, more than --max-bad 0\.1 .*; 2 epochs are saved", error)
    assert f"60 of 64 images of {root}" in error
    assert f"{root}/004.png: No such file or directory; {root}/005.png: not an image" in error
    assert error.endswith("; … and 55 more")
    assert "Traceback" not in result.err
    assert result.err.count("notice: 60 of 64 images") == 1
    assert sum(map(len, result.err.splitlines())) < 3000

    shutil.rmtree(root)
    shutil.copytree(tmp_path / "whole", root)
    result = script("pretrain", *arguments, "--max-bad", 1, "--output", tmp_path / "goes-on")
    assert result.status == 0
    said = [line for line in result.err.splitlines() if line.startswith(("notice", "epoch")) and "/3 " not in line]
    assert [line[:24] for line in said if "images" in line and line.startswith("notice")] == [
        "notice: 60 of 64 images ",
        "notice: 60 of 64 images ",
        "notice: in the end 60 of",
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_when_nothing_is_left_it_is_one_line(
    script: Any, image_folder: Any, tmp_path: Path, break_after_first_epoch: Any, workers: int
) -> None:
    root = image_folder({"": 16})
    break_after_first_epoch(root, 0)
    options = "--data", root, "--workers", workers, *OPTIONS, "--max-bad", 1, "--output", tmp_path / "run"
    result = script("pretrain", *options)
    assert result.status == 2
    error = result.err.splitlines()[-1]
    assert re.fullmatch(rf"error: {root}: none of the 16 images can be read: {root}/\d+\.png: .{{5,60}}", error)
    assert "Traceback" not in result.err


def test_validation_images_are_watched_too(
    script: Any, image_folder: Any, tmp_path: Path, break_after_first_epoch: Any
) -> None:
    root = image_folder({}, "set")
    for part, count in (("train", 8), ("val", 10)):
        shutil.copytree(image_folder({"a": count, "b": count}, f"made-{part}"), root / part)
    break_after_first_epoch(root / "val" / "b", 9)
    options = ["--data", root, "--workers", 0, *COMMON, "--output"]
    result = script("finetune", *options, tmp_path / "run")
    assert result.status == 0, result.err
    line = f"notice: 1 of 20 images of {root}, validation part cannot be read"
    assert result.err.count(line) == 2
    break_after_first_epoch(root / "val" / "b", 8)
    result = script("finetune", *options, tmp_path / "strict", "--max-bad", 0)
    assert result.status == 2
    assert "0 of the data; 2 epochs are saved, continue with --resume: 1 of 19 images" in result.err.splitlines()[-1]


def test_the_label_goes_with_the_image_that_stands_in(image_folder: Any) -> None:
    root = image_folder({"blue": 4, "red": 4})
    train, _ = build_finetune_datasets(root, (32, 32), mean=(0, 0, 0), std=(1, 1, 1))
    last = max(number for number, label in enumerate(train.labels or []) if label == 0)
    Path(name_of(train.source, last)).unlink()
    image, label = train[last]
    assert label == 1
    assert image.mean((1, 2)).argmax() == 1  # the second class of the folder is green
    assert train.replaced == [last]


class Processes:
    """An accelerator of two processes, of which the other one has found what it has found."""

    num_processes, is_main_process, device = 2, True, "cpu"

    def __init__(self, other: list[int]) -> None:
        self.other = torch.tensor(other, dtype=torch.int32)

    def reduce(self, marks: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum"
        return marks + self.other


def test_what_several_processes_find_is_put_together(image_folder: Any) -> None:
    root = image_folder({"a": 5, "b": 5})
    parts = build_finetune_datasets(root, (32, 32))  # 8 and 2 images
    parts[0].damaged[[1, 2]] = True
    accelerator: Any = Processes([0, 0, 1, 1, 0, 0, 0, 0, 0, 1])
    lines: list[str] = []
    BadData(parts, 0.5, accelerator, lines.append).tell(1)
    assert [line.split(" images of")[0] for line in lines] == ["notice: 3 of 8", "notice: 1 of 2"]
    with pytest.raises(DataError, match=r"`max_bad` 0\.3 .*: 3 of 8 images"):
        BadData(parts, 0.3, accelerator, lines.append).check(1)


def test_it_is_looked_at_every_hundred_batches(image_folder: Any) -> None:
    part = build_finetune_datasets(image_folder({"a": 5, "b": 5}), (32, 32))[0]
    accelerator: Any = Processes([0] * 8)
    batches = BadData([part], 0.1, accelerator, str).watch(range(1000), 0)
    seen = []
    with pytest.raises(DataError, match="2 of 8 images"):
        for batch in batches:
            seen.append(batch)
            part.damaged[:2] = batch >= 150
    assert (len(seen), len(batches), batches.stop) == (200, 1000, 1000)


def test_an_error_of_a_worker_is_one_line() -> None:
    loader = torch.utils.data.DataLoader(Failing(), num_workers=1)
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    assert str(caught.value) == "a: nothing there: b"


class Failing(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise DataError("a: nothing\nthere: b")


ODD = [b"-dash", b"--output", b"new\nline", b"bad\xff\xfeutf", b"L" * 200, b"Case", b"case", b"=1+1", b"$x_1$", b" "]
FILES = [b"-x.png", b"a\nb.png", b"\xff.png", b"q" * 200 + b".png", b"A.png"]


def test_odd_names(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(ODD):
        Path(os.fsdecode(b"set/" + name)).mkdir(parents=True)
        for file in FILES:
            with open(b"set/" + name + b"/" + file, "wb") as stream:  # noqa: PTH123  # names in bytes
                Image.new("RGB", (40, 30), (25 * number, 99, 9)).save(stream, "PNG")
    with open(b"set/new\nline/bad\n\xff.png", "wb") as stream:  # noqa: PTH123
        stream.write(b"x")
    result = script("finetune", "--data", "set", "--workers", 0, *COMMON, "--epochs", 1, "--output", "run")
    assert result.status == 0, result.err
    starts = ("data: ", "notice: skipped 1 ", "from scratch", "training ", "epoch 1/1: ")
    assert all(line.startswith(starts) for line in result.err.splitlines()), result.err
    names = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in sorted(map(os.fsdecode, ODD))]
    indices = json.loads((tmp_path / "run" / "class_indices.json").read_text(encoding="utf-8"))
    assert list(indices.values()) == names
    assert "bad\\xff\\xfeutf" in names

    Path("li\nne").symlink_to("set")
    result = script("finetune", "--data", "li\nne", "--workers", 0, *COMMON, "--epochs", 1, "--output", "linked")
    assert all(line.startswith(starts) for line in result.err.splitlines()), result.err

    result = script("predict", "run", "set", "--topk", len(ODD))
    assert result.status == 0, result.err
    assert "\n  set/new line/bad \\udcff.png: not an image, or a format that is not read\n" in result.err
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 51
    assert {row["file"].encode("utf-8").replace(b"\\udcff", b"\xff") for row in rows} >= {
        b"set/%s/%s" % (name, file) for name in ODD if b"\xff" not in name for file in FILES
    }
    assert {row["top7_class"].removeprefix("'") for row in rows if not row["error"]} <= set(names)
    (line,) = (line for line in result.out.splitlines() if line.startswith("accuracy"))
    right = [row for row in rows if row["file"].startswith(f"set/{row['predicted_class'].removeprefix(chr(39))}/")]
    assert line.endswith(f"({len(right)} of 50)")


def test_a_folder_whose_name_is_no_utf8_is_its_class(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    predictions = [Prediction(folder / f"{name}.png", (name,), (1.0,)) for name in ("caf\\xe9", "other")]
    assert right_by_folder(predictions, ("caf\\xe9", "other")) == 1

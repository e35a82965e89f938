"""scripts/segment.py: train, predict, evaluate."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shapes import make_pairs, make_parts

from convnextv2 import EncoderConfig
from convnextv2.segmentation import Segmenter, SegmenterConfig
from convnextv2.segmentation.masks import palette
from convnextv2.weights import save_checkpoint

NAMES = ("ground", "disc", "square")
CPU = ("--device", "cpu")


def make_checkpoint(
    path: Path, in_chans: int = 3, values: Any = (0, 1, 2), ignored: int | None = 255, **more: Any
) -> Path:
    """Of a network whose class of a pixel is its brightest channel, more or less: so results differ in place."""
    torch.manual_seed(0)
    encoder = EncoderConfig((1, 1, 1, 1), (8, 8, 16, 16), in_chans, patch_size=8)
    model = Segmenter(SegmenterConfig(encoder, "fpn", 64, NAMES))
    about = {"mean": [0.5] * in_chans, "std": [0.25] * in_chans, "img_size": [32, 32]}
    save_checkpoint(path, model, model.config, {**about, **more, "class_values": list(values), "ignore_index": ignored})
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "net.safetensors")


def test_train_predict_and_evaluate(script: Any, tmp_path: Path) -> None:
    data, run = make_parts(tmp_path / "set", (6, 2)), tmp_path / "run"
    (data / "classes.json").write_text(json.dumps(NAMES))
    tiny = "--depths 1 1 1 1 --dims 8 8 16 16 --patch-size 8 --img-size 32 --workers 0 --batch-size 3".split()  # noqa: SIM905
    own = "--decoder", "fpn", "--decoder-width", 64, "--epochs", 1, "--lr", "1e-3", "--tracker", "none"
    result = script("segment", "train", "--data", data, "--output", run, *tiny, *own, *CPU)
    assert result.status == 0, result.err
    assert "best mIoU" in result.out
    assert "on 2 validation images (epoch 1 of 1)" in result.out

    result = script("segment", "evaluate", run, data, "--output", tmp_path / "e.json", "--overlap", 0, *CPU)
    assert result.status == 0, result.err
    found = json.loads((tmp_path / "e.json").read_text())
    (row,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["miou"] == row["val_miou"]
    assert [one["name"] for one in found["classes"]] == list(NAMES)
    lines = result.out.splitlines()
    assert lines[0].split() == ["class", "IoU", "pixels"]
    assert [line.split()[0] for line in lines[1:4]] == list(NAMES)
    assert lines[4] == f"mIoU {found['miou']:.2f} %, pixel accuracy {found['pixel_accuracy']:.2f} %, 2 images"

    result = script("segment", "predict", run, data / "val" / "images", "--output", tmp_path / "out", *CPU)
    assert result.status == 0, result.err
    assert result.out == f"2 images segmented, 0 unreadable: {tmp_path / 'out'}\n"
    written = make_folder_of(tmp_path / "out", data / "val" / "images", tmp_path / "pair")
    whole = script("segment", "evaluate", run, written, "--all", *CPU)
    assert "mIoU 100.00 %, pixel accuracy 100.00 %, 2 images" in whole.out  # its own masks


def make_folder_of(results: Path, images: Path, root: Path) -> Path:
    root.mkdir()
    (root / "images").symlink_to(images)
    (root / "masks").symlink_to(results / "masks")
    return root


def test_masks_have_values_palette_and_the_size_of_the_image(script: Any, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "net.safetensors", values=(0, 7, 255), ignored=9)
    images = tmp_path / "in"
    (images / "deep").mkdir(parents=True)
    rng, sizes = np.random.default_rng(0), {"a.png": (50, 33), "deep/b.png": (9, 100), "c.jpg": (32, 32)}
    for name, (width, height) in sizes.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(images / name)
    turned = Image.fromarray(rng.integers(0, 255, (20, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(images / "d.jpg", exif=exif)
    (images / "notes.txt").write_text("x")
    (images / "e.png").write_bytes(b"\x89PNG broken")
    result = script("segment", "predict", path, images, "--output", tmp_path / "out", "--batch-size", 3, *CPU)
    assert result.status == 0, result.err
    assert "4 images segmented, 1 unreadable" in result.out
    assert "notes.txt" in result.err
    assert "e.png" in result.err
    expected = {**sizes, "d.jpg": (20, 60)}
    for name, size in expected.items():
        mask, shown = (
            Image.open((tmp_path / "out" / part / name).with_suffix(".png")) for part in ("masks", "overlays")
        )
        assert (mask.mode, mask.size, shown.mode, shown.size) == ("P", size, "RGB", size)
        values = np.asarray(mask)
        assert set(np.unique(values)) <= {0, 7, 255}
        colours = np.asarray(mask.convert("RGB"))
        for number, value in enumerate((0, 7, 255)):
            assert (colours[values == value] == palette(3)[number]).all()
        if name.endswith("png"):
            pixels, shown = np.asarray(Image.open(images / name)).astype(float), np.asarray(shown)
            assert (shown[values == 0] == pixels[values == 0]).all()
            mixed = 0.5 * pixels + 0.5 * colours
            assert np.abs(shown - mixed)[values != 0].max(initial=0) <= 0.5
    assert sorted(path.name for path in (tmp_path / "out" / "masks").rglob("*.png")) == [
        "a.png", "b.png", "c.png", "d.png"
    ]  # fmt: skip


def test_large_values_and_many_channels(script: Any, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "net.safetensors", 5, values=(0, 7, 1000))
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 50, 5)).astype(np.float32))
    result = script("segment", "predict", path, tmp_path / "x.npy", "--output", tmp_path / "out", *CPU)
    assert result.status == 0, result.err
    values = np.asarray(Image.open(tmp_path / "out" / "masks" / "x.png"))
    assert values.shape == (40, 50)
    assert set(np.unique(values)) <= {0, 7, 1000}
    assert Image.open(tmp_path / "out" / "overlays" / "x.png").size == (50, 40)


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_and_workers_change_nothing(script: Any, checkpoint: Path, tmp_path: Path, workers: int) -> None:
    images = make_pairs(tmp_path / "set", 5, size=(40, 70)) / "images"
    outputs = []
    for number, options in enumerate((("--batch-size", 1), ("--batch-size", 7, "--workers", workers))):
        output = tmp_path / f"out{number}"
        assert script("segment", "predict", checkpoint, images, "--output", output, *options, *CPU).status == 0
        outputs.append([np.asarray(Image.open(path)) for path in sorted((output / "masks").iterdir())])
    assert len(outputs[0]) == 5
    for one, other in zip(*outputs, strict=True):
        assert (one != other).mean() < 0.001  # rounding may turn the nearest decisions
    assert len({one.tobytes() for one in outputs[0]}) == 5


def test_no_input_is_written_over(script: Any, checkpoint: Path, tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "set", 2)
    before = {path: path.read_bytes() for path in root.rglob("*.png")}

    def refused(words: str, *arguments: object) -> None:
        result = script("segment", "predict", checkpoint, *arguments, *CPU)
        assert result.status == 2, result.out
        assert len(result.err.splitlines()) == 1
        assert words in result.err

    images = root / "images"
    refused("lies among what is read", images, "--output", images)
    refused("lies among what is read", images, "--output", images / "new", "--overwrite")
    refused("is not empty", images / "000.png", "--output", tmp_path)
    refused("lies among what is read", root / "masks" / "000.png", "--output", root, "--overwrite")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "masks").symlink_to(images)
    refused("lies among what is read", images / "000.png", "--output", tmp_path / "out", "--overwrite")
    (tmp_path / "out" / "masks").unlink()
    (tmp_path / "out" / "masks").mkdir()
    os.link(images / "000.png", tmp_path / "out" / "masks" / "000.png")
    refused("is one of the images that are read", images / "000.png", "--output", tmp_path / "out", "--overwrite")
    refused("is no folder", images, "--output", checkpoint)
    refused("no such file or folder", tmp_path / "none", "--output", tmp_path / "o")
    refused("would both be called 000.png", images, root / "masks", "--output", tmp_path / "o")
    assert {path: path.read_bytes() for path in root.rglob("*.png")} == before
    assert not (tmp_path / "o").exists()


def test_masks_of_the_data_are_not_written_over(script: Any, checkpoint: Path, tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "set", 2)
    before = {path: path.read_bytes() for path in root.rglob("*.png")}
    result = script("segment", "predict", checkpoint, root / "images", "--output", root, "--overwrite", *CPU)
    assert result.status == 2
    assert "holds images/, whose masks may lie in masks/; choose another folder" in result.err
    assert {path: path.read_bytes() for path in root.rglob("*.png")} == before


def test_overlays_of_native_images_can_be_seen(script: Any, tmp_path: Path) -> None:
    ranges = [[600.0, 3600.0]] * 5
    path = make_checkpoint(tmp_path / "net.safetensors", 5, pixels="native", crop="area", value_ranges=ranges)
    values = np.random.default_rng(0).uniform(600, 3600, (40, 50, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    options = "--output", tmp_path / "out", "--opacity", 1e-6, *CPU
    result = script("segment", "predict", path, tmp_path / "x.npy", *options)
    assert result.status == 0, result.err
    shown = np.asarray(Image.open(tmp_path / "out" / "overlays" / "x.png")).astype(float)
    assert np.abs(shown - (values[..., :3] - 600) / 3000 * 255).max() <= 1


def test_a_part_for_validation_is_taken_and_no_class_is_ignored(script: Any, checkpoint: Path, tmp_path: Path) -> None:
    data = make_parts(tmp_path / "set", (2, 3))
    both = script("segment", "evaluate", checkpoint, data, *CPU)
    assert both.status == 0, both.err
    shutil.rmtree(data / "train")
    assert script("segment", "evaluate", checkpoint, data, *CPU).out == both.out
    for path in (data / "val" / "masks").iterdir():
        Image.fromarray(np.array([0, 1, 255], np.uint8)[np.asarray(Image.open(path))]).save(path)
    (data / "classes.json").write_text('{"ground": 0, "disc": 1, "square": 255}')
    assert script("segment", "evaluate", checkpoint, data, *CPU).out == both.out


def test_one_place_by_two_names_is_told(
    script: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = "--output", "x.json", "--confusion", tmp_path / "x.json"
    result = script("segment", "evaluate", checkpoint, make_pairs(tmp_path / "set", 2), "--all", *places, *CPU)
    assert result.status == 2
    assert "--output and --confusion need places of their own" in result.err


def test_other_values_of_the_same_classes_are_evaluated(script: Any, checkpoint: Path, tmp_path: Path) -> None:
    data = make_pairs(tmp_path / "set", 3)
    plain = script("segment", "evaluate", checkpoint, data, "--all", *CPU)
    for path in (data / "masks").iterdir():
        Image.fromarray(np.array([50, 0, 200], np.uint8)[np.asarray(Image.open(path))]).save(path)
    (data / "classes.json").write_text('{"disc": 0, "ground": 50, "square": 200}')
    assert script("segment", "evaluate", checkpoint, data, "--all", *CPU).out == plain.out
    assert plain.status == 0, plain.err
    (data / "classes.json").write_text('{"disc": 0, "ground": 50, "cube": 200}')
    result = script("segment", "evaluate", checkpoint, data, "--all", *CPU)
    assert result.status == 2
    assert result.err.endswith("not in both: cube, square\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "NET", "SET", "--overlap", "1"], "overlap must be a share from 0 to 0.9"),
        (["evaluate", "NET", "SET", "--window", "33"], "not divisible by the patch size 8"),
        (["evaluate", "NET", "none"], "images: no such folder; expected DATA/images/NAME.jpg"),
        (["evaluate", "none", "SET"], "none: no such file or folder"),
        (["evaluate", "NET", "SET", "--output", "NET"], "ends in .json, not in .safetensors"),
        (["predict", "NET", "SET", "--workers", "-1"], "must not be negative"),
        (["predict", "NET", "SET", "--precision", "fp16"], "fp16 needs a GPU"),
        (["train", "--data", "none", "--output", "run"], "--data none: no such folder"),
        (["train", "--data", "SET", "--output", "run", "--views", "2"], "--views would change images"),
        (["train", "--data", "SET", "--output", "run", "--mixup", "1"], "--mixup is no option of this kind of run"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(Path("net.safetensors"))
    make_pairs(Path("set"), 2)
    given = [{"NET": "net.safetensors", "SET": "set"}.get(word, word) for word in arguments]
    result = script("segment", *given, *(CPU if arguments[0] != "train" else ()))
    assert result.status == 2
    assert words in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    assert not Path("run").exists()


def test_help_is_there_for_each(script: Any) -> None:
    for command, option in (("train", "--decoder-width"), ("predict", "--opacity"), ("evaluate", "--confusion")):
        result = script("segment", command, "--help")
        assert result.status == 0
        assert option in result.out
    result = script("segment")
    assert result.status == 2
    assert "{train,predict,evaluate}" in result.err

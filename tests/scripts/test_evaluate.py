"""``evaluate.py``: the right images, the right numbers, in every place they are told; and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from convnextv2 import ConvNeXtV2, EncoderConfig, create_fcmae
from convnextv2.data.plain import label_fraction
from convnextv2.evaluation import extract_features, knn_predict, knn_votes, load_encoder, score
from convnextv2.evaluation.calibration import calibration
from convnextv2.models.config import ClassifierConfig
from convnextv2.weights.checkpoint import save_checkpoint

METADATA = {"mean": [0.5] * 3, "std": [0.25] * 3, "img_size": [32, 32]}
CPU = "--device", "cpu"
CLASSES = ("blue", "green", "red")


@pytest.fixture
def place(
    tmp_path: Path, tiny_encoder: EncoderConfig, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """``pre`` and ``fine``, runs; ``photos``, of classes that are told apart by colour."""
    monkeypatch.chdir(tmp_path)
    fcmae = create_fcmae(tiny_encoder, img_size=32, decoder_dim=16)
    save_checkpoint("pre/checkpoints/last.safetensors", fcmae, fcmae.config, METADATA)
    image_folder({"red": 10, "green": 10, "blue": 10}, "photos")
    return tmp_path


def classifier(path: str, encoder: EncoderConfig, names: tuple[str, ...] = CLASSES, favourite: int = 1) -> None:
    """A checkpoint that calls everything ``favourite``."""
    config = ClassifierConfig(encoder, 3, class_names=names)
    model = ConvNeXtV2(config)
    with torch.no_grad():
        model.head.bias[favourite] = 100.0  # type: ignore[index, operator]
    save_checkpoint(path, model, config, METADATA)


def numbers(out: str) -> list[str]:
    """The cells of the table's one row."""
    heading, row = out.splitlines()
    assert heading.split() == ["what", "top-1", "macro", "F1", "AUROC", "cal.", "error", "images"]
    assert len(row) == len(heading) <= 100
    cells = [cell.strip() for cell in row.split("  ") if cell]
    return [*cells[:3], cells[-1]]


@pytest.mark.parametrize("what", ["knn", "linear"])
def test_features_tell_colours_apart(script: Any, place: Path, what: str) -> None:
    outputs = "--output", "r.json", "--confusion", "c.png", "--calibration", "b.png"
    result = script("evaluate", what, "pre", "photos", *CPU, *outputs)
    assert result.status == 0, result.err
    own = {"knn": "knn, k 20, mean", "linear": "linear, C "}[what]
    told = numbers(result.out)
    assert told[0].startswith(own)
    assert told[1:] == ["100.00 %", "100.00 %", "6"]
    read = json.loads(Path("r.json").read_text())
    assert list(read)[:3] == ["evaluation", "checkpoint", "data"]
    assert (read["evaluation"], read["checkpoint"], read["data"]) == (what, "pre", "photos")
    assert (read["top1"], read["images"], read["train_images"], read["img_size"]) == (100.0, 6, 24, [32, 32])
    assert [row["name"] for row in read["classes"]] == [*CLASSES]
    assert Image.open("c.png").size[0] > 100
    assert Image.open("b.png").size == (500, 600)
    assert (read["auroc"], read["images"]) == (100.0, sum(row["images"] for row in read["reliability"]))
    assert f" 100.00 %  {read['calibration_error']:8.2f} %" in result.out


def test_the_numbers_are_those_of_the_options(script: Any, place: Path) -> None:
    options = ["--pooling", "mean_std", "--k", 3, "--label-fraction", 0.5, "--seed", 7, "--val-fraction", 0.4]
    options += ["--img-size", "32x48", "--batch-size", 5, "--workers", 1, "--untrained"]
    for path in Path("photos").rglob("*.png"):
        Image.effect_noise((40, 40), 90).convert("RGB").save(path)  # nothing to see
    result = script("evaluate", "knn", "pre", "photos", *CPU, "--output", "r.json", *options)
    assert result.status == 0, result.err
    frozen = load_encoder("pre", img_size=(32, 48), untrained=7)
    training, validation = frozen.datasets("photos", seed=7, val_fraction=0.4)
    train = extract_features(frozen.model, label_fraction(training, 0.5, 7), pooling="mean_std")
    val = extract_features(frozen.model, validation, pooling="mean_std")
    expected = score(knn_predict(train, val.values, k=3), val.labels, val.classes)
    assert 0 < expected.top1 < 100
    read = json.loads(Path("r.json").read_text())
    assert read["top1"] == pytest.approx(expected.top1)
    votes = knn_votes(train, val.values, k=3)
    known = calibration(votes / votes.sum(1, keepdim=True), val.labels)
    assert (read["auroc"], read["brier"]) == (pytest.approx(known.auroc), pytest.approx(known.brier))
    assert [row["predicted"] for row in read["classes"]] == [row["predicted"] for row in expected.as_dict()["classes"]]
    about = {"k": 3, "pooling": "mean_std", "label_fraction": 0.5, "untrained": True, "img_size": [32, 48]}
    assert about.items() <= read.items()
    assert (read["train_images"], read["images"], read["seed"]) == (9, 12, 7)
    told = numbers(result.out)
    assert told == [
        "knn, k 3, mean_std, 0.5 of the labels, untrained",
        f"{expected.top1:.2f} %",
        f"{expected.macro_f1:.2f} %",
        "12",
    ]


def test_classify_asks_the_head(script: Any, place: Path, tiny_encoder: EncoderConfig) -> None:
    classifier("fine/checkpoints/best.safetensors", tiny_encoder, ("red", "green", "violet"))
    shutil.rmtree("photos/blue")
    result = script("evaluate", "classify", "fine", "photos", *CPU, "--output", "r.json", "--confusion", "c.png")
    assert result.status == 0, result.err
    assert numbers(result.out) == ["classify", "50.00 %", "33.33 %", "4"]
    read = json.loads(Path("r.json").read_text())
    assert read["classes"] == [
        {"name": "red", "recall": 0.0, "images": 2, "predicted": {"green": 2}},
        {"name": "green", "recall": 100.0, "images": 2, "predicted": {"green": 2}},
        {"name": "violet", "recall": None, "images": 0, "predicted": {}},
    ]
    assert read["calibration_error"] == pytest.approx(50)  # as good as certain, and half of it wrong
    assert read["brier"] == pytest.approx(1)
    shutil.rmtree("photos/red")
    result = script("evaluate", "classify", "fine", "photos", *CPU, "--output", "r.json")
    assert result.status == 2  # of one class nothing is to be told apart


def refused(script: Any, *arguments: object, word: str) -> None:
    before = sorted(Path().rglob("*"))
    result = script("evaluate", *arguments, *CPU)
    lines = [line for line in result.err.splitlines() if not line.startswith(("usage:", " ", "notice:", "training"))]
    assert result.status == 2, result
    assert len(lines) == 1, result.err
    assert word in lines[0], result.err
    assert result.out == ""
    assert sorted(Path().rglob("*")) == before


def test_classes_that_the_checkpoint_does_not_know(script: Any, place: Path, tiny_encoder: EncoderConfig) -> None:
    classifier("fine.pth", tiny_encoder, ("red", "green", "yellow"))
    refused(script, "classify", "fine.pth", "photos", word="holds classes that fine.pth does not: blue; it knows red,")
    classifier("fine.pth", tiny_encoder, ())
    refused(script, "classify", "fine.pth", "photos", word="does not: blue, green, red; it knows 0, 1, 2")
    Path("class_indices.json").write_text(json.dumps(dict(enumerate(CLASSES))))
    assert numbers(script("evaluate", "classify", "fine.pth", "photos", *CPU).out)[1] == "33.33 %"


def test_options_that_do_not_go_together(script: Any, place: Path) -> None:
    refused(script, "linear", "pre", "photos", "--k", 3, word="--k is for knn, not for linear")
    for option in (["--pooling", "mean"], ["--label-fraction", 1], ["--untrained"]):
        refused(script, "classify", "pre", "photos", *option, word=f"{option[0]} is for knn and linear")
    refused(script, "classify", "pre", "photos", word="has no classifier; fine-tune it first")
    refused(script, "knn", "pre", "photos", "--output", "x", "--confusion", "x", word="places of their own")
    refused(script, "knn", "pre", "photos", "--confusion", "x.png", "--calibration", "x.png", word="of their own")
    refused(script, "guess", "pre", "photos", word="invalid choice")
    for option, wrong in (("--label-fraction", "0"), ("--label-fraction", "2"), ("--k", "0"), ("--seed", 2**32)):
        refused(script, "knn", "pre", "photos", option, wrong, word=option)
    refused(script, "knn", "pre", "photos", "--seed=-1", word="--seed")
    refused(script, "knn", "pre", "photos", "--workers", -1, word="--workers")
    refused(script, "knn", "pre", "photos", "--val-fraction", 1, word="strictly between 0 and 1")
    refused(script, "knn", "pre", "nowhere", word="no such folder")
    refused(script, "knn", "nowhere", "photos", word="no such file or folder")
    refused(script, "knn", "pre", "photos", "--img-size", 8, word="the patch size 16")


def parted(root: Path, train: dict[str, int], val: dict[str, int]) -> Path:
    """Photographs in ``train`` and ``val``."""
    for part, counts in (("train", train), ("val", val)):
        for name, count in counts.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                shutil.copy(f"photos/{name}/{number:03d}.png", folder / f"{part}{number}.png")
    return root


def test_few_images(script: Any, place: Path) -> None:
    one = parted(Path("one"), dict.fromkeys(CLASSES, 1), dict.fromkeys(CLASSES, 1))
    for what in ("knn", "linear"):
        result = script("evaluate", what, "pre", one, *CPU)
        assert result.status == 0, result.err
        assert numbers(result.out)[1:] == ["100.00 %", "100.00 %", "3"]
    assert numbers(script("evaluate", "knn", "pre", one, *CPU).out)[0] == "knn, k 3, mean"
    empty = parted(Path("empty"), dict.fromkeys(CLASSES, 2), {"red": 2, "green": 2, "blue": 0})
    result = script("evaluate", "linear", "pre", empty, *CPU, "--output", "r.json", "--confusion", "c.png")
    assert numbers(result.out)[1:] == ["100.00 %", "100.00 %", "4"]
    assert "empty/val/blue: class folder without a usable image" in result.err
    read = json.loads(Path("r.json").read_text())["classes"]
    assert [(row["name"], row["recall"]) for row in read] == [("blue", None), ("green", 100.0), ("red", 100.0)]
    more = parted(Path("more"), {"red": 2, "green": 2}, dict.fromkeys(CLASSES, 2))
    refused(script, "knn", "pre", more, word="more/val: holds classes that more/train does not: blue")
    single = parted(Path("single"), {"red": 2}, {"red": 2})
    refused(script, "linear", "pre", single, word="at least two classes")
    refused(script, "linear", "pre", "single/train", word="at least two classes")


def test_images_that_break_are_left_out_and_told(script: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convnextv2.data.folders.FULL_CHECK_BYTES", 0)
    for name in ("red", "green"):
        content = Path(f"photos/{name}/004.png").read_bytes()
        Path(f"photos/{name}/004.png").write_bytes(content[:300])
    result = script("evaluate", "knn", "pre", "photos", *CPU, "--output", "r.json")
    assert result.status == 0, result.err
    read = json.loads(Path("r.json").read_text())
    assert read["train_images"] + read["images"] == 28
    assert sum(row["images"] for row in read["classes"]) == read["images"]
    assert "skipped 2 unusable files" in result.err
    assert "photos/green/004.png: " in result.err


def test_gray_networks_and_other_channels(script: Any, place: Path, tiny_encoder: EncoderConfig) -> None:
    for channels in (1, 5):
        config = EncoderConfig(tiny_encoder.depths, tiny_encoder.dims, channels, tiny_encoder.patch_size)
        fcmae = create_fcmae(config, img_size=32, decoder_dim=16)
        metadata = {"mean": [0.5] * channels, "std": [0.25] * channels}
        save_checkpoint(f"{channels}.pth", fcmae, fcmae.config, metadata)
    result = script("evaluate", "linear", "1.pth", "photos", *CPU)
    assert result.status == 0, result.err
    refused(script, "linear", "5.pth", "photos", word="found no usable one")
    assert script("evaluate", "knn", "1.pth", "digits", *CPU, "--label-fraction", 0.1).status == 0


def test_weights_that_are_not_finite(script: Any, place: Path, tiny_encoder: EncoderConfig) -> None:
    fcmae = create_fcmae(tiny_encoder, img_size=32, decoder_dim=16)
    with torch.no_grad():
        fcmae.encoder.stages[0][0].pwconv2.bias[0] = math.nan
    save_checkpoint("nan.pth", fcmae, fcmae.config, METADATA)
    refused(script, "knn", "nan.pth", "photos", word="nan.pth: encoder.stages.0.0.pwconv2.bias holds NaN or infinity")
    with torch.no_grad():
        fcmae.encoder.stages[0][0].pwconv2.bias[0] = 0
        fcmae.encoder.stages[3][0].pwconv2.weight.fill_(3e38)
    save_checkpoint("large.pth", fcmae, fcmae.config, METADATA)
    for what in ("knn", "linear"):
        refused(script, what, "large.pth", "photos", "--output", "r.json", word="images are NaN or infinite")


def test_a_picture_takes_no_photographs_place(script: Any, place: Path) -> None:
    before = Path("photos/red/000.png").read_bytes()
    for output in ("photos/red/000.png", "pre", "pre/checkpoints/last.safetensors"):
        for picture in ("--confusion", "--calibration"):
            refused(script, "knn", "pre", "photos", picture, output, "--overwrite", word=output)
    assert Path("photos/red/000.png").read_bytes() == before


def test_a_stream_takes_the_result_alone(script: Any, place: Path) -> None:
    result = script("evaluate", "knn", "pre", "photos", *CPU, "--output", "/dev/null")
    assert (result.status, result.out) == (0, "")
    assert "100.00 %" in result.err

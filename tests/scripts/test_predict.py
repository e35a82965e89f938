import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convnextv2 import EncoderConfig
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import ClassifierConfig
from convnextv2.weights.checkpoint import save_checkpoint

CLASSES = ("blue", "green", "red")


@pytest.fixture
def classifier(tmp_path: Path, tiny_encoder: EncoderConfig) -> Callable[..., Path]:
    """Writes a checkpoint; its bias makes it call everything ``favourite``."""

    def make(names: tuple[str, ...] = CLASSES, favourite: int = 1) -> Path:
        config = ClassifierConfig(tiny_encoder, 3, class_names=names)
        model = ConvNeXtV2(config)
        with torch.no_grad():
            model.head.weight.zero_()  # type: ignore[union-attr, operator]
            model.head.bias.copy_(torch.tensor([0.0, 0.0, 0.0]))  # type: ignore[union-attr, operator, arg-type]
            model.head.bias[favourite] = 2.0  # type: ignore[union-attr, index]
        path = tmp_path / "run" / "checkpoints" / "best.safetensors"
        save_checkpoint(path, model, config, {"img_size": [32, 48]})
        return path

    return make


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_table(script: Any, classifier: Any, image_folder: Any, tmp_path: Path) -> None:
    root = image_folder({"red": 2, "green": 3})
    (root / "green" / "001.png").rename(root / "green" / "b, 日本.png")
    (root / "green" / "broken.jpg").write_bytes(b"\xff\xd8nothing")
    (root / "notes.txt").write_text("x")
    output = tmp_path / "out" / "results.csv"
    result = script(
        "predict", classifier(), root, "--output", output, "--topk", 2, "--batch-size", 2, "--device", "cpu"
    )
    assert result.status == 0, result.err
    table = rows(output)
    assert list(table[0]) == [
        "file", "predicted_class", "probability",
        "top1_class", "top1_probability", "top2_class", "top2_probability", "error",
    ]  # fmt: skip
    names = ["green/000.png", "green/002.png", "green/b, 日本.png", "green/broken.jpg", "red/000.png", "red/001.png"]
    assert [Path(row["file"]).relative_to(root).as_posix() for row in table] == names
    probability = torch.tensor([0.0, 2.0, 0.0]).softmax(0)
    for row in table:
        if "broken" in row["file"]:
            assert row["error"]
            assert {row[key] for key in row if key not in ("file", "error")} == {""}
        else:
            assert (row["predicted_class"], row["top1_class"], row["error"]) == ("green", "green", "")
            assert float(row["probability"]) == pytest.approx(probability[1].item(), abs=1e-6)
            assert float(row["top2_probability"]) == pytest.approx(probability[0].item(), abs=1e-6)
    assert "5 images classified, 1 unreadable" in result.out
    assert "60.00% (3 of 5)" in result.out
    assert "broken.jpg" in result.err
    assert "notes.txt" in result.err
    assert [path.name for path in output.parent.iterdir()] == ["results.csv"]


def test_names_from_class_indices(
    script: Any, classifier: Any, image_folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, root, output = classifier(names=()), image_folder({"": 1}), tmp_path / "r.csv"
    assert script("predict", path, root, "--output", output).status == 0
    assert rows(output)[0]["predicted_class"] == "1"
    indices = path.parent.parent / "class_indices.json"
    indices.write_text(json.dumps({"0": "a", "1": "b", "2": "c"}))
    result = script("predict", path, root, "--output", output)
    assert rows(output)[0]["predicted_class"] == "b"
    assert "accuracy" not in result.out
    for wrong in ('{"0": "a"}', "[1, 2]", "nonsense"):
        indices.write_text(wrong)
        result = script("predict", path, root, "--output", output)
        assert result.status == 0
        assert "class_indices.json: passed over" in caplog.text
        caplog.clear()
        assert rows(output)[0]["predicted_class"] == "1"


def test_columns_of_choice(script: Any, classifier: Any, image_folder: Any, tmp_path: Path) -> None:
    path, root, output = classifier(), image_folder({"green": 2}), tmp_path / "results.csv"
    (root / "green" / "=1.png").write_bytes(b"nothing")
    two = "predict", path, root, "--output", output, "--columns", "file,class", "--no-header"
    assert script(*two).status == 0
    with output.open(newline="") as file:
        found = list(csv.reader(file))
    folder = root / "green"
    assert found == [
        [str(folder / "000.png"), "green"],
        [str(folder / "001.png"), "green"],
        [str(folder / "=1.png"), ""],
    ]
    result = script(*two)
    assert result.status == 2
    assert "say --overwrite" in result.err
    columns = "--columns", "name, top2_probability,error,probability"
    assert script("predict", path, root, "--output", output, "--overwrite", *columns).status == 0
    assert output.read_text().splitlines()[0] == "name,top2_probability,error,probability"
    table = rows(output)
    assert [row["name"] for row in table] == ["000.png", "001.png", "./=1.png"]
    assert [bool(row["error"]) for row in table] == [False, False, True]
    assert float(table[0]["probability"]) > float(table[0]["top2_probability"]) > 0
    for wrong in ("file,colour", "top9_class", "", "file,,class"):
        result = script("predict", path, root, "--output", tmp_path / "x.csv", "--columns", wrong)
        assert (result.status, len(result.err.splitlines())) == (2, 1)
        assert "there is no column" in result.err
    assert not (tmp_path / "x.csv").exists()


def test_batch_and_workers_change_nothing(script: Any, image_folder: Any, tmp_path: Path, tiny_encoder: Any) -> None:
    config = ClassifierConfig(tiny_encoder, 4, head_init_scale=50)
    save_checkpoint(tmp_path / "x.pth", ConvNeXtV2(config), config, {"img_size": [32, 32]})
    root = image_folder({"": 7})
    tables = []
    for number, options in enumerate((["--batch-size", 3], ["--batch-size", 7, "--workers", 2])):
        output = tmp_path / f"{number}.csv"
        assert script("predict", tmp_path / "x.pth", root, "--output", output, "--topk", 9, *options).status == 0
        tables.append(rows(output))
    assert len({row["probability"] for row in tables[0]}) > 1
    for one, other in zip(*tables, strict=True):
        assert one["file"] == other["file"]
        for place in range(1, 5):
            key = f"top{place}_probability"
            assert float(one[key]) == pytest.approx(float(other[key]), abs=2e-6)


def test_names_that_are_not_unicode(script: Any, classifier: Any, image_folder: Any, tmp_path: Path) -> None:
    root = image_folder({"": 1})
    os.rename(os.fsencode(root / "000.png"), os.fsencode(root) + b"/\xff.png")  # noqa: PTH104  # a name in bytes
    result = script("predict", classifier(), root, "--output", tmp_path / "r.csv")
    assert result.status == 0, result.err
    assert rows(tmp_path / "r.csv")[0]["file"].endswith("\\udcff.png")

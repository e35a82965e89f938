"""Features on the command line: the file, tables and pictures beside it, and what users get wrong."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from convnextv2 import EncoderConfig, create_fcmae, create_model
from convnextv2.evaluation.features import Features
from convnextv2.evaluation.projection import Projection
from convnextv2.report.embedding import SIDE, fitted, save_alike, save_map, short
from convnextv2.weights.checkpoint import save_checkpoint

Script = Callable[..., Any]


@pytest.fixture
def place(tmp_path: Path, tiny_encoder: EncoderConfig, image_folder: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photographs of three colours, each in a folder, one unreadable, and a checkpoint that tells colours apart."""
    monkeypatch.chdir(tmp_path)
    photos = image_folder({"red": 7, "green": 7, "blue": 7}, name="photos")
    (photos / "red" / "broken.png").write_bytes(b"no image")
    (photos / "notes.txt").write_text("no image")
    model = create_fcmae(tiny_encoder, img_size=32, decoder_dim=16)
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            if parameter.dim() > 1 and "grn" not in name:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    save_checkpoint(tmp_path / "pre/checkpoints/last.safetensors", model, model.config, {"img_size": [32, 32]})
    return tmp_path


def embed(script: Script, *arguments: object) -> Any:
    return script("embed", "pre", "photos", "--device", "cpu", *arguments)


def rows_of(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))


def test_features_tables_and_pictures(place: Path, script: Script) -> None:
    result = embed(script, "--neighbours", 3, "--outliers", 4, "--map", "map.png", "--output", "out/f.npz")
    assert result.status == 0, result.err
    names = ["f.npz", "f_neighbours.csv", "f_neighbours.png", "f_outliers.csv", "f_outliers.png"]
    assert sorted(path.name for path in (place / "out").iterdir()) == names
    lines = result.out.splitlines()
    assert lines[0] == "21 images embedded, 1 unreadable (pooling: mean): out/f.npz"
    assert result.err.count("notice: skipped 1 unusable file") == 2
    assert "broken.png: not an image" in result.err
    found = np.load("out/f.npz")
    theirs = NearestNeighbors(n_neighbors=11, metric="cosine", algorithm="brute").fit(found["features"])
    apart, numbers = theirs.kneighbors(found["features"])

    rows = rows_of("out/f_neighbours.csv")
    assert len(rows) == 21 * 3
    for row, number in zip(rows, np.repeat(np.arange(21), 3), strict=True):
        other = numbers[number][int(row["rank"])]
        assert (row["file"], row["neighbour"]) == (found["names"][number], found["names"][other])
        assert row["class"] == found["classes"][found["labels"][number]] == row["file"].split("/")[0]
        assert row["neighbour_class"] == row["neighbour"].split("/")[0]
        assert float(row["cosine_similarity"]) == pytest.approx(1 - apart[number][int(row["rank"])], abs=2e-6)
    same = np.mean([row["class"] == row["neighbour_class"] for row in rows])
    assert same > 0.8
    assert lines[2].startswith(f"neighbours: 3 of each image, {same:.1%} of the same class: ")

    rows = rows_of("out/f_outliers.csv")
    expected = apart[:, 1:].mean(1)
    order = np.argsort(-expected)[:4]
    assert [row["file"] for row in rows] == [found["names"][number] for number in order]
    assert [float(row["distance"]) for row in rows] == pytest.approx(expected[order], abs=2e-6)
    assert [row["nearest"] for row in rows] == [found["names"][numbers[number][1]] for number in order]
    for picture, size in (("map.png", (900, 650)), ("out/f_neighbours.png", (4 * 136 + 8, 12 * 156 + 8))):
        assert Image.open(picture).size == size
    assert Image.open("out/f_outliers.png").size[1] == 4 * 156 + 8

    again = embed(script, "--neighbours", 3, "--outliers", 4, "--map", "map.png", "--output", "out/f.npz")
    assert again.status == 0, "files of its own kind are replaced"
    assert not (set(place.rglob(".*")) - {place})


def test_a_table_of_patches(place: Path, script: Script) -> None:
    result = embed(script, "--per-patch", "--dtype", "float16", "--output", "f.parquet")
    assert (result.status, result.out) == (0, "21 images embedded, 1 unreadable (every patch): f.parquet\n")
    assert pq.read_table("f.parquet")["features"].combine_chunks().to_numpy_ndarray().shape == (21, 2, 2, 24)


def fails(script: Script, *arguments: object, word: str) -> None:
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    result = embed(script, *arguments)
    lines = [line for line in result.err.splitlines() if not line.startswith(("usage:", " ", "notice:"))]
    assert result.status == 2, result
    assert len(lines) == 1, result.err
    assert word in lines[0], result.err
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_what_is_refused(place: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(script, "--neighbours", 0, word="--neighbours")
    fails(script, "--workers", -1, word="must not be negative")
    fails(script, "--per-patch", "--pooling", "model", word="leave --pooling model out")
    fails(script, "--per-patch", "--pooling", "stages", "--neighbours", 3, word="leave --pooling stages out")
    fails(script, "--per-patch", "--pooling", "mean_std", word="maps that are not pooled")
    fails(script, "--output", "-", "--outliers", 3, word="write beside --output; name a file")
    fails(script, "--output", "f.csv", word="a file of features ends in .npz, .parquet")
    fails(script, "--output", "f.npz", "--map", "f.npz", word="places of their own")
    fails(script, "--output", "f.npz", "--neighbours", 2, "--map", "./f_neighbours.png", word="places of their own")
    fails(script, "--map", "photos/red/000.png", word="lies among the inputs")
    fails(script, "--output", "photos", word="is a folder")
    fails(script, "--output", "pre/checkpoints/last.safetensors", word="ends in .npz, .parquet")
    fails(script, "--img-size", 8, word="the patch size 16")
    Path("f_neighbours.csv").write_text("mine")
    fails(script, "--output", "f.npz", "--neighbours", 2, word="f_neighbours.csv: exists and is not a table of files")
    assert embed(script, "--output", "f.npz", "--neighbours", 2, "--overwrite").status == 0
    (place / "one.png").write_bytes((place / "photos/red/000.png").read_bytes())
    result = script("embed", "pre", "one.png", "--device", "cpu", "--output", "g.npz", "--neighbours", 2)
    assert (result.status, result.err.splitlines()[-1]) == (
        2, "error: expected two images or more and one neighbour or more, got 1 and 2",
    )  # fmt: skip
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    fails(script, "--map", "m.png", "--map-by", "umap", word="pip install umap-learn")
    fails(script, "--output", "m.parquet", word="pip install pyarrow")


def test_onnx_files_are_explained_in_one_line(place: Path, script: Script) -> None:
    shape = ["n", 3, "h", "w"]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "logits")]
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["logits"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), "c.onnx")
    (place / "d.onnx").write_bytes(b"text")
    for name, word in (("c.onnx", "a classifier's answers"), ("d.onnx", "cannot open it"), ("e.onnx", "no such file")):
        result = script("embed", name, "photos", "--device", "cpu", "--output", "g.npz")
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith(f"error: {name}: ")
        assert word in result.err
        assert len(result.err.splitlines()) == 1
        assert not Path("g.npz").exists()


def test_names_that_spreadsheets_would_run(place: Path, script: Script) -> None:
    (place / "photos" / "red").rename(place / "photos" / "=1+1")
    result = embed(script, "--output", "f.npz", "--neighbours", 1, "--outliers", 21)
    assert result.status == 0
    for name in ("f_neighbours.csv", "f_outliers.csv"):
        cells = [cell for row in rows_of(name) for cell in row.values()]
        assert any("=1+1" in cell for cell in cells)
        assert not any(cell.startswith(("=", "+", "@", "-")) for cell in cells)


def images_of(features: Features) -> Callable[[int], Tensor]:
    return lambda number: torch.full((3, 96, 144), number / len(features))


def features(count: int, classes: int = 3, unlabelled: int = 0) -> Features:
    labels = torch.arange(count) % max(1, classes)
    labels[:unlabelled] = -1
    names = tuple(Path(f"{'deep ' * 8}/$x_{number}$.png") for number in range(count))
    return Features(torch.randn(count, 4), labels, names, tuple(f"$class_{n}$ {'long ' * 9}" for n in range(classes)))


def colours_of(path: Path) -> set[tuple[int, ...]]:
    pixels = np.asarray(Image.open(path).convert("RGB"))[60:-60, 80:560]  # inside of the axes
    return {tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist() if max(pixel) - min(pixel) > 60}


@pytest.mark.pictures
@pytest.mark.parametrize(("classes", "unlabelled"), [(3, 0), (3, 4), (0, 12), (30, 0), (1, 1)])
def test_maps(tmp_path: Path, classes: int, unlabelled: int) -> None:
    given = features(60, classes, 60 if not classes else unlabelled)
    points = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    save_map(tmp_path / "m.png", Projection(points, ("first", "second")), given, "a $title")
    picture = Image.open(tmp_path / "m.png")
    assert picture.size == (900, 650)
    hues = {max(range(3), key=colour.__getitem__) for colour in colours_of(tmp_path / "m.png")}
    assert len(hues) >= (2 if classes > 1 else 1)


@pytest.mark.pictures
def test_rows_show_images_and_whose_class_they_are_of(tmp_path: Path) -> None:
    given = features(9)
    found = torch.rand(9, 3), torch.tensor([[3, 1, 4]] * 9)
    save_alike(
        tmp_path / "x.png", given, [0, 8], found, images_of(given), mean=[0.0] * 3, std=[1.0] * 3, before=["0.123 ", ""]
    )
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    height, width = 96 + 28, SIDE + 8
    assert pixels.shape[:2] == (2 * height + 8, 4 * width + 8)
    for row, query in enumerate((0, 8)):
        for column, number in enumerate((query, 3, 1, 4)):
            cell = pixels[
                8 + row * height + 20 + 5 : 8 + row * height + 110, 8 + column * width + 5 : (column + 1) * width
            ]
            assert abs(cell - round(255 * number / 9)).max() <= 1
            title = pixels[8 + row * height : 26 + row * height, 8 + column * width : (column + 1) * width]
            red, green = (title[..., 0] - title[..., 1] > 60).any(), (title[..., 1] - title[..., 0] > 40).any()
            same = number % 3 == query % 3
            assert (red, green) == ((False, False) if column == 0 else (not same, same)), (row, column)
        margins = pixels[8 + row * height : 26 + row * height, [2, *(column * width + 2 for column in range(1, 5))]]
        assert margins.min() > 200, "titles keep to their images"


def test_sizes_in_pictures() -> None:
    assert fitted(torch.zeros(3, 500, 1000)).shape == (3, 72, 144)
    assert fitted(torch.zeros(3, 96, 96)).shape == (3, 144, 144)
    assert fitted(torch.zeros(1, 8, 71)).shape == (1, 8, 71)
    assert fitted(torch.zeros(3, 1, 4000)).shape == (3, 1, 144)
    assert short("a/very/long/name", 8) == "…ng/name"
    assert short("name", 4) == "name"


def test_a_classifier_as_its_head_sees_it(place: Path, script: Script, tiny_encoder: EncoderConfig) -> None:
    model = create_model(tiny_encoder, num_classes=3)
    save_checkpoint("fine.pth", model, model.config, {"img_size": [32, 32]})
    result = script("embed", "fine.pth", "photos", "--device", "cpu", "--pooling", "model", "--workers", 1)
    assert (result.status, result.out) == (0, "21 images embedded, 1 unreadable (pooling: mean, norm): features.npz\n")
    assert np.load("features.npz")["features"].mean(1) == pytest.approx(0, abs=1e-5)

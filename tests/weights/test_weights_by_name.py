"""Every script takes published weights by name: files in the official layouts, under their names, from a server."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import folder_server
from weights_helpers import sparse_official

from convnextv2 import create_fcmae, create_model
from convnextv2.weights import load_checkpoint

ENCODER, CLASSIFIER = "convnextv2_atto_1k_224_fcmae", "convnextv2_atto_1k_224_ema"
SHARP = "convnextv2_nano_22k_384_ema"
LICENCE = "{}: the published weights are under CC-BY-NC 4.0, not for commercial use"
SMALL = ["--img-size", "64", "--epochs", "1", "--warmup-epochs", "0", "--workers", "0", "--device", "cpu"]
SMALL += ["--batch-size", "4", "--tracker", "none"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Mirrors: of self-supervised weights as pre-training writes them, and of encoders alone in the dense layout."""
    torch.manual_seed(1)
    fcmae, classifier = create_fcmae("convnextv2_atto"), create_model("convnextv2_atto")
    encoder = {name: value for name, value in classifier.state_dict().items() if not name.startswith(("norm", "head"))}
    files = {"sparse": sparse_official(fcmae), "dense": encoder}
    folders = {}
    for kind, weights in files.items():
        folder = tmp_path_factory.mktemp(kind)
        for path, state in {f"pt_only/{ENCODER}": weights, f"im1k/{CLASSIFIER}": classifier.state_dict()}.items():
            (folder / path).parent.mkdir()
            torch.save({"model": state}, folder / f"{path}.pt")
        folders[kind] = folder
    return folders


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def mirror(published: Any, hub: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Starts the mirror of a kind."""
    with contextlib.ExitStack() as servers:
        yield lambda kind: monkeypatch.setenv(
            "CONVNEXTV2_MIRROR", servers.enter_context(folder_server(published[kind]))
        )


@pytest.fixture
def photos(image_folder: Any) -> Path:
    return image_folder({"blue": 5, "red": 5}, "photos", (70, 66))


def done(result: Any) -> Any:
    assert result.status == 0, result.err
    return result


def test_from_the_name_to_predictions(script: Any, mirror: Any, photos: Path, tmp_path: Path, caplog: Any) -> None:
    mirror("sparse")
    first = tmp_path / "first"
    told = done(script("finetune", "--data", photos, "--init", ENCODER, "--output", first, *SMALL)).err
    assert caplog.messages.count(LICENCE.format(ENCODER)) == 1
    assert f"{ENCODER}.pt: " in told and "freshly initialised: norm, head" in told
    table = tmp_path / "table.csv"
    done(script("predict", first, photos, "--output", table, "--device", "cpu"))
    assert {row["predicted_class"] for row in csv.DictReader(table.open())} <= {"blue", "red"}

    further = tmp_path / "further"
    arguments = ["--data", photos, "--init", ENCODER, "--output", further, *SMALL, "--reconstruct-every", "0"]
    told = done(script("pretrain", *arguments)).err
    assert "tensors loaded; nothing is freshly initialised" in told
    for checkpoint in (ENCODER, further):
        picture = tmp_path / "picture.png"
        done(script("visualize", checkpoint, photos, "--output", picture, "--max-images", 1, "--device", "cpu"))
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    dense = tmp_path / "dense.safetensors"
    assert "verified: " in done(script("convert_sparse_to_dense", ENCODER, dense)).out
    assert load_checkpoint(dense).metadata["licence"] == "CC-BY-NC 4.0"
    result = tmp_path / "knn.json"
    done(script("evaluate", "knn", ENCODER, photos, "--output", result, "--img-size", 64, "--device", "cpu"))
    assert json.loads(result.read_text())["checkpoint"] == ENCODER


def test_pre_training_goes_on_from_an_encoder_alone(script: Any, mirror: Any, photos: Path, tmp_path: Path) -> None:
    mirror("dense")
    arguments = ["--data", photos, "--init", ENCODER, "--output", tmp_path / "run", *SMALL, "--reconstruct-every", "0"]
    assert "the decoder is freshly initialised" in done(script("pretrain", *arguments)).err


def test_a_classifier_by_its_name(script: Any, mirror: Any, photos: Path, tmp_path: Path, caplog: Any) -> None:
    mirror("dense")
    table = tmp_path / "table.csv"
    done(script("predict", CLASSIFIER, photos, "--output", table, "--img-size", 64, "--device", "cpu"))
    assert caplog.messages.count(LICENCE.format(CLASSIFIER)) == 1
    known = dict(line.split(" ", 1) for line in (row["predicted_class"] for row in csv.DictReader(table.open())))
    assert known and all(re.fullmatch(r"n\d{8}", synset) and words for synset, words in known.items())
    (photos / "blue").rename(photos / "n01440764")  # as ImageNet has them
    (photos / "red").rename(photos / "n15075141")
    result = tmp_path / "result.json"
    done(script("evaluate", "classify", CLASSIFIER, photos, "--output", result, "--img-size", 64, "--device", "cpu"))
    assert len(json.loads(result.read_text())["classes"]) == 1000
    mirror("sparse")  # where it is another file; the cached one is taken from here on
    expected = done(script("summary", "convnextv2_atto")).out
    assert done(script("summary", CLASSIFIER)).out == expected
    assert "3,708,400 parameters" in expected
    run = tmp_path / "run"
    done(script("finetune", "--data", photos, "--init", CLASSIFIER, "--linear-probe", "--output", run, *SMALL))
    loaded = load_checkpoint(run).state_dict["stages.0.0.dwconv.weight"]
    assert torch.equal(loaded, load_checkpoint(CLASSIFIER).state_dict["stages.0.0.dwconv.weight"])
    timm = tmp_path / "timm.safetensors"
    done(script("convert_sparse_to_dense", CLASSIFIER, timm, "--to", "timm", "--no-verify"))
    card = tmp_path / "CARD.md"
    done(script("model_card", CLASSIFIER, "--images", "ImageNet", "--licence", "cc-by-nc-4.0", "--output", card))
    assert f"# {CLASSIFIER}\n" in card.read_text()
    refused = script("visualize", CLASSIFIER, photos)
    assert refused.status == 2 and "is a classifier" in refused.err


def test_an_address_stands_for_a_file(script: Any, published: Any, hub: Path, tmp_path: Path) -> None:
    with folder_server(published["sparse"]) as address:
        url = f"{address}/pt_only/{ENCODER}.pt".replace("//", "//anna:secret@") + "?key=hidden"
        out = done(script("convert_sparse_to_dense", url, tmp_path / "dense.pth"))
    assert not re.search("secret|hidden|anna", out.out + out.err)
    assert [path.name for path in hub.glob("*/*.pt")] == [f"{ENCODER}.pt"]


def test_images_are_as_large_as_in_training(hub: Path) -> None:
    hub.mkdir(parents=True)
    state = create_model("convnextv2_nano").state_dict()
    torch.save({"model": state}, hub / f"{SHARP}.pt")
    checkpoint = load_checkpoint(SHARP)
    assert checkpoint.preprocessing(3)[2] == (384, 384)
    torch.save({"model": state}, hub / "other.pt")
    assert load_checkpoint(hub / "other.pt").preprocessing(3)[2] == (224, 224)


@pytest.mark.parametrize(
    "name", ["predict", "evaluate", "visualize", "convert_sparse_to_dense", "finetune", "pretrain"]
)
def test_a_name_that_is_none_is_one_line_with_the_nearest(script: Any, photos: Path, tmp_path: Path, name: str) -> None:
    wrong = "convnextv2_atto_1k_224_fcmea"
    output = ["--output", tmp_path / "out.png" if name == "visualize" else tmp_path / "out"]
    arguments: dict[str, list[object]] = {
        "predict": [wrong, photos, "--output", tmp_path / "out.csv"],
        "evaluate": ["knn", wrong, photos],
        "visualize": [wrong, photos, *output],
        "convert_sparse_to_dense": [wrong, tmp_path / "out.pth"],
    }
    result = script(name, *arguments.get(name, ["--data", photos, "--init", wrong, *output, *SMALL]))
    assert result.status == 2
    found = "no such file or folder, and no published checkpoint is named so"
    assert result.err.splitlines()[-1] == f"error: {wrong}: {found}; did you mean {ENCODER}?"
    assert not list(tmp_path.glob("out*"))

"""Networks in the formats of others: what their own programs load and compute, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from convnextv2 import ClassifierConfig, ConvNeXtV2, EncoderConfig, create_fcmae
from convnextv2.data.transforms import image_transform
from convnextv2.export import TARGETS, export, source_of
from convnextv2.export import onnx as onnx_room
from convnextv2.export import transformers as transformers_room
from convnextv2.weights import CheckpointError, init_classifier, load_checkpoint, load_model, save_checkpoint

ENCODER = EncoderConfig((1, 1, 2, 1), (8, 16, 16, 24))
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
NAMES = ("ant", "bee", "cat")
Convert = Callable[..., str]


def randomised(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 and "grn" not in name else 10
        nn.init.normal_(parameter, std=fan**-0.5)
    return model.eval()


@pytest.fixture
def classifier(tmp_path) -> Callable[..., ConvNeXtV2]:
    """A classifier in ``classifier.safetensors``."""

    def make(side: int = 64, pooling: str = "mean", **changes: object) -> ConvNeXtV2:
        config = ClassifierConfig(replace(ENCODER, **changes), 3, class_names=NAMES, pooling=pooling)
        model = randomised(ConvNeXtV2(config))
        channels = config.encoder.in_chans
        said = {"mean": MEAN[:channels], "std": STD[:channels], "img_size": [side, side]}
        save_checkpoint(tmp_path / "classifier.safetensors", model, config, said)
        return model

    return make


@pytest.fixture
def pretrained(tmp_path):
    model = randomised(create_fcmae(ENCODER, img_size=64, decoder_dim=8, backend="reference"))
    save_checkpoint(tmp_path / "run/checkpoints/last.safetensors", model, model.config)
    return model.encoder


@pytest.fixture
def convert(script, tmp_path, monkeypatch) -> Convert:
    """What the converter prints in a folder of its own, or, with ``fails``, the one line of its error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, fails: bool = False) -> str:
        done = script("convert_sparse_to_dense", *arguments)
        if not fails:
            assert (done.status, done.err) == (0, "")
            return done.out
        assert done.status == 2
        return done.err.splitlines()[-1]

    return run


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max() / expected.abs().max()) <= 1e-5


def photo(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("patch_size", [32, 16, 8])
@torch.no_grad()
def test_transformers_loads_the_folder(convert, classifier, patch_size):
    ours = classifier(patch_size=patch_size)
    out = convert("classifier.safetensors", "folder", "--to", "transformers")
    assert "\nverified in transformers: largest relative difference" in out
    theirs = transformers.AutoModelForImageClassification.from_pretrained("folder").eval()
    given = images(2, 3, 64, 100)
    close(theirs(given).logits, ours(given))
    assert theirs.config.id2label == dict(enumerate(NAMES))
    assert theirs.config.patch_size == patch_size // 8
    Path("usual").touch()
    assert {file.stat().st_mode for file in Path("folder").iterdir()} == {Path("usual").stat().st_mode}
    back = convert("folder/model.safetensors", "back.safetensors")
    assert "layout transformers" in back
    assert all(
        torch.equal(value, ours.state_dict()[name])
        for name, value in load_model("back.safetensors").state_dict().items()
    )


@pytest.mark.parametrize(
    ("side", "sizes"), [(64, [(80, 101), (300, 64), (64, 64)]), (224, [(300, 451), (480, 640)]), (384, [(600, 400)])]
)
def test_the_image_processor_gives_our_pixels(convert, classifier, side, sizes):
    classifier(side)
    convert("classifier.safetensors", "folder", "--to", "transformers", "--no-verify")
    exact = transformers.AutoImageProcessor.from_pretrained("folder", use_fast=False)
    usual = transformers.AutoImageProcessor.from_pretrained("folder")
    ours = image_transform((side, side), MEAN, STD)
    levels = torch.tensor(STD)[:, None, None] * 255
    for size in sizes:
        expected = ours(photo(*size))
        for processor, allowed in ((exact, 1e-4), (usual, 2.01)):
            found = torch.as_tensor(np.asarray(processor(photo(*size), return_tensors="pt")["pixel_values"]))[0]
            assert found.shape == expected.shape
            assert float(((found - expected) * levels).abs().max()) <= allowed


def test_where_the_image_processor_differs_is_told(convert, classifier):
    """Half of an odd margin: ours is rounded to even, theirs down."""
    classifier(192)
    out = convert("classifier.safetensors", "folder", "--to", "transformers", "--no-verify")
    assert "use_fast=False); its crop starts one pixel before ours\n" in out
    processor = transformers.AutoImageProcessor.from_pretrained("folder", use_fast=False)
    assert processor.size["shortest_edge"] == 219
    image = photo(219, 219)
    found = torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"]))[0]
    expected = image_transform((192, 192), MEAN, STD)(image)
    torch.testing.assert_close(found[:, 1:, 1:], expected[:, :-1, :-1])
    classifier(side=64, in_chans=1)
    assert transformers_room.processor_options(source("classifier.safetensors")) is None


def source(path: str):
    return source_of(load_checkpoint(path))


@torch.no_grad()
def test_an_encoder_alone_goes_to_transformers(convert, pretrained):
    out = convert("run", "folder", "--to", "transformers")
    assert "pooler_output has a norm that nothing has trained" in out
    theirs = transformers.AutoModel.from_pretrained("folder").eval()
    given = images(1, 3, 64, 96)
    close(theirs(given).last_hidden_state, pretrained.forward_features(given))
    assert convert("run", "folder", "--to", "transformers", "--num-classes", 4)
    theirs = transformers.AutoModelForImageClassification.from_pretrained("folder")
    assert theirs.config.id2label == {index: f"LABEL_{index}" for index in range(4)}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean_std", "stages"])
def test_onnxruntime_runs_the_file(convert, classifier, pooling):
    """Standard operators, though the network itself runs on the compiled kernels here."""
    ours = classifier(patch_size=8, pooling=pooling)
    out = convert("classifier.safetensors", "network.onnx", "--to", "onnx")
    assert "\nverified in onnx: largest relative difference" in out
    assert out.endswith(" session.run(['logits'], {'images': images}), which gives logits [B, 3]\n")
    onnx.checker.check_model("network.onnx", full_check=True)
    assert {node.domain for node in onnx.load("network.onnx").graph.node} == {""}
    session = onnxruntime.InferenceSession("network.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for shape in ((2, 3, 16, 24), (1, 3, 8, 8), (3, 3, 61, 40)):
        (found,) = session.run(["logits"], {"images": images(*shape).numpy()})
        close(torch.from_numpy(found), ours(images(*shape)))
    said = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert said == {
        "mean": MEAN, "std": STD, "img_size": [64, 64], "class_names": list(NAMES), "converted_from": "official-dense"
    }  # fmt: skip
    assert TARGETS["onnx"].is_one(Path("network.onnx"))


@pytest.mark.slow
@torch.no_grad()
def test_a_program_of_torch_export_is_loaded(convert, pretrained):
    out = convert("run", "program.pt2", "--to", "torch-export")
    assert "\nverified in torch-export: largest relative difference" in out
    assert "it takes images of 64×64 or more, gives features [B, 24, h, w], and needs torch alone\n" in out
    extra = {"sparse-fcmae.json": ""}
    program = torch.export.load("program.pt2", extra_files=extra)
    assert {str(node.target).partition(".")[0] for node in program.graph.nodes if node.op == "call_function"} == {
        "aten"
    }
    for shape in ((1, 3, 64, 64), (3, 3, 100, 75)):
        close(program.module()(images(*shape)), pretrained.forward_features(images(*shape)))
    assert json.loads(extra["sparse-fcmae.json"])["converted_from"] == "fcmae"
    assert TARGETS["torch-export"].is_one(Path("program.pt2"))
    assert not TARGETS["torch-export"].is_one(Path("run/checkpoints/last.safetensors"))


def test_what_computes_something_else_is_not_written(convert, classifier, monkeypatch):
    classifier()
    convert("classifier.safetensors", "folder", "--to", "transformers", "--no-verify")
    before = Path("folder/config.json").read_bytes()
    monkeypatch.setattr(transformers_room, "EPS", 1.0)
    error = convert("classifier.safetensors", "folder", "--to", "transformers", fails=True)
    assert "classifier.safetensors: what was written computes something else, so it was removed: largest" in error
    assert Path("folder/config.json").read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == ["classifier.safetensors", "folder"]


def test_what_a_format_cannot_hold_is_refused(convert, classifier, monkeypatch):
    classifier(kernel_size=5)
    assert "kernel size 7 alone, not 5; use the target onnx" in convert(
        "classifier.safetensors", "folder", "--to", "transformers", fails=True
    )
    classifier(pooling="mean_std")
    assert "pools by the mean alone, not mean_std" in convert(
        "classifier.safetensors", "folder", "--to", "transformers", fails=True
    )
    monkeypatch.setattr(onnx_room, "LARGEST", 1000)
    error = convert("classifier.safetensors", "a.onnx", "--to", "onnx", fails=True)
    assert "less than 2 GB; use the target torch-export" in error
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = convert("classifier.safetensors", "a.onnx", "--to", "onnx", fails=True)
    told = "onnx needs onnx and onnxscript and onnxruntime; install with: pip install onnx onnxscript onnxruntime"
    assert error == f"error: the target {told}"
    assert [path.name for path in Path().iterdir()] == ["classifier.safetensors"]


@pytest.mark.parametrize(
    ("output", "to", "message"),
    [
        ("a.pth", "onnx", "OUTPUT must end in .onnx, got 'a.pth'"),
        ("a.onnx", "torch-export", "OUTPUT must end in .pt2"),
        ("a.onnx", "official-dense", "OUTPUT must end in .safetensors"),
        ("a.pth", "transformers", "OUTPUT is a folder for transformers"),
        ("-", "transformers", "goes down no stream; name a folder"),
        (".", "transformers", "the input classifier.safetensors lies in it"),
        ("work", "transformers", "exists and is not what the target transformers writes that was written here"),
        ("work/notes", "transformers", "is a file, and what the target transformers writes is a folder"),
        ("work/notes.onnx", "onnx", "exists and is not what the target onnx writes"),
        ("classifier.safetensors/folder", "transformers", "Not a directory"),
    ],
)
def test_places_that_are_refused(convert, classifier, output, to, message):
    classifier()
    Path("work").mkdir()
    for name in ("notes", "notes.onnx"):
        Path("work", name).write_text("a week")
    assert message in convert("classifier.safetensors", output, "--to", to, fails=True)
    assert sorted(path.name for path in Path().iterdir()) == ["classifier.safetensors", "work"]
    assert {path.read_text() for path in Path("work").iterdir()} == {"a week"}


def test_an_earlier_folder_is_replaced_and_what_was_added_to_it_is_not(convert, classifier):
    classifier(32)
    Path("new/folder").mkdir(parents=True)
    for _ in range(2):
        convert("classifier.safetensors", "new/folder", "--to", "transformers", "--no-verify")
    Path("new/folder/README.md").write_text("mine")
    error = convert("classifier.safetensors", "new/folder", "--to", "transformers", "--no-verify", fails=True)
    assert "exists and is not what the target transformers writes" in error
    error = convert("new/folder/model.safetensors", "new/folder", "--to", "transformers", fails=True)
    assert "lies in it; choose another name" in error
    assert Path("new/folder/README.md").read_text() == "mine"


def test_what_was_said_of_the_images_comes_back(convert, classifier):
    model, said = classifier(), {"mean": [1800.0] * 3, "std": [90.0] * 3, "img_size": [64, 96], "pixels": "native"}
    said |= {"crop": "area", "value_ranges": [[0.0, 4000.0]] * 3, "val_top1": 36.0}
    save_checkpoint("classifier.safetensors", model, model.config, said)
    out = convert("classifier.safetensors", "folder", "--to", "transformers", "--no-verify")
    assert "no image processor" in out
    assert not Path("folder/preprocessor_config.json").exists()
    assert said.items() <= load_checkpoint("folder").metadata.items()
    convert("folder", "back.safetensors")
    assert said.items() <= load_checkpoint("back.safetensors").metadata.items()


@pytest.mark.parametrize("to", ["fcmae", "transformers"])
def test_scores_and_classes_of_a_head_go_with_it(convert, classifier, to):
    model = classifier()
    about = {"mean": MEAN, "std": STD, "img_size": [64, 64], "class_names": list(NAMES), "val_top1": 36.0}
    save_checkpoint("classifier.safetensors", model.state_dict(), None, about)
    target = ("back.safetensors", "--to", "official-dense") if to == "fcmae" else ("folder", "--to", to, "--no-verify")
    convert("classifier.safetensors", *target, "--num-classes", 3)
    found = load_checkpoint(target[0]).metadata
    assert "mean" in found
    assert not {"class_names", "val_top1"} & found.keys()


def test_exports_are_no_checkpoints(tmp_path):
    for name in (tmp_path / "a.onnx", tmp_path / "a.pt2"):
        name.write_bytes(b"anything")
        with pytest.raises(CheckpointError, match="is a program that was exported; give the checkpoint"):
            load_checkpoint(name)


def test_a_fresh_head_takes_no_names_of_the_old_one(convert, classifier):
    classifier()
    convert("classifier.safetensors", "folder", "--to", "transformers", "--num-classes", 3, "--no-verify")
    assert json.loads(Path("folder/config.json").read_text())["id2label"]["0"] == "LABEL_0"


def test_the_classifier_that_init_classifier_makes_is_the_one_that_is_exported(classifier, convert):
    model = classifier()
    started = ConvNeXtV2(model.config)
    init_classifier(started, "classifier.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(started.parameters(), source("classifier.safetensors").network.parameters(), strict=True)
    )


def test_from_python(classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    classifier()
    assert "tolerance 1e-05" in export(source("classifier.safetensors"), "transformers", "folder")
    assert not export(source("classifier.safetensors"), "transformers", "folder", check=False)
    with pytest.raises(ValueError, match="unknown format 'coreml'; choose one of onnx, torch-export, transformers"):
        export(source("classifier.safetensors"), "coreml", "folder")

"""Files as other programs write and want them, made and read by those programs themselves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch
import timm
import torch
import transformers
from weights_helpers import ENCODER, randomise, same, sparse_official

from convnextv2 import ConvNeXtV2, create_fcmae, create_model
from convnextv2.evaluation.prediction import load_classifier
from convnextv2.models.config import ClassifierConfig
from convnextv2.weights import (
    CheckpointError,
    init_classifier,
    init_fcmae,
    load_checkpoint,
    load_model,
    read_checkpoint,
    read_weights,
    save_checkpoint,
    write_layout,
)
from sparse_ops.grid import DenseGrid

SHAPE: dict[str, Any] = {"depths": list(ENCODER.depths), "hidden_sizes": list(ENCODER.dims), "layer_norm_eps": 1e-6}
SMALL = {"depths": ENCODER.depths, "dims": ENCODER.dims}


def images(side: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, side, side + 32, generator=torch.Generator().manual_seed(0))


def randomised(model: Any) -> Any:
    return randomise(model).float().eval()


def assert_starts(path: Path, last: torch.Tensor) -> None:
    """A classifier and a masked autoencoder start from the file, with its last features ``[B, C, h, w]``."""
    classifier = create_model(ENCODER, num_classes=4).eval()
    init_classifier(classifier, path)
    autoencoder = create_fcmae(ENCODER, img_size=64, decoder_dim=8, backend="reference").eval()
    init_fcmae(autoencoder, path)
    with torch.no_grad():
        torch.testing.assert_close(classifier.forward_features(images()), last, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(autoencoder.encoder(images(), DenseGrid(2)), last, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_folder_of_transformers(tmp_path: Path, script: Any, image_folder: Any) -> None:
    names = {0: "ant", 1: "bee", 2: "cat"}
    config = transformers.ConvNextV2Config(**SHAPE, image_size=64, id2label=names)
    theirs = randomised(transformers.ConvNextV2ForImageClassification(config))
    theirs.save_pretrained(tmp_path / "folder")
    transformers.ConvNextImageProcessor(size={"shortest_edge": 96}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        tmp_path / "folder"
    )
    assert_starts(tmp_path / "folder", theirs.convnextv2(images()).last_hidden_state)
    classifier = load_classifier(tmp_path / "folder")
    assert classifier.classes == ("ant", "bee", "cat")
    assert (classifier.mean, classifier.img_size) == ((0.1, 0.2, 0.3), (96, 96))
    torch.testing.assert_close(classifier.model(images()), theirs(images()).logits, rtol=1e-4, atol=1e-4)
    output = tmp_path / "results.csv"
    done = script("predict", tmp_path / "folder", image_folder({"": 2}), "--output", output)
    assert done.status == 0, done.err
    other = ConvNeXtV2(ClassifierConfig(ENCODER, 3, class_names=("x", "y", "z")))
    assert "the head there is of classes of other names" in str(init_classifier(other, tmp_path / "folder"))
    (tmp_path / "folder" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: is no JSON"):
        load_checkpoint(tmp_path / "folder")


def test_labels_that_transformers_made_up_are_no_names(tmp_path: Path) -> None:
    transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**SHAPE, num_labels=3)).save_pretrained(
        tmp_path
    )
    assert load_classifier(tmp_path).classes == ("0", "1", "2")


@torch.no_grad()
def test_backbones_of_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.ConvNextV2Config(**SHAPE, out_features=["stage1", "stage4"])
    backbone = randomised(transformers.ConvNextV2Backbone(config))
    last = transformers.ConvNextV2Model(transformers.ConvNextV2Config(**SHAPE)).eval()
    last.load_state_dict(backbone.state_dict(), strict=False)
    expected = last(images()).last_hidden_state
    backbone.save_pretrained(tmp_path / "backbone")
    assert_starts(tmp_path / "backbone", expected)
    assert "left out, for it is no part of a ConvNeXt V2: hidden_states_norms" in caplog.text
    segmenter = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=config, num_labels=3, hidden_size=8, auxiliary_channels=8, auxiliary_in_channels=24
        )
    )
    segmenter.backbone.load_state_dict(backbone.state_dict())
    torch.save(segmenter.state_dict(), tmp_path / "segmenter.pth")
    caplog.clear()
    assert_starts(tmp_path / "segmenter.pth", expected)
    assert "decode_head, auxiliary_head" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_tiny", "fcmae_convnextv2_atto"])
def test_feature_lists_of_timm(tmp_path: Path, name: str) -> None:
    import convnextv2.timm  # noqa: F401  # registers the last one

    pyramid = randomised(timm.create_model(name, **SMALL, features_only=True))
    torch.save(pyramid.state_dict(), tmp_path / "features.pth")
    assert_starts(tmp_path / "features.pth", pyramid(images())[-1])
    part = timm.create_model("convnextv2_atto", **SMALL, features_only=True, out_indices=(0, 1))
    torch.save(part.state_dict(), tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="is missing"):
        init_classifier(create_model(ENCODER), tmp_path / "part.pth")


@pytest.mark.parametrize(
    "prefix", ["backbone.", "model.", "net.", "module.", "module.model.", "model.net.", "_orig_mod.module.backbone."]
)
@pytest.mark.parametrize("layout", ["official-dense", "timm", "transformers", "sparse-official", "fcmae"])
def test_prefixes(tmp_path: Path, prefix: str, layout: str) -> None:
    source = create_fcmae(ENCODER, img_size=64, decoder_dim=8)
    state = write_layout(read_weights(source.state_dict()), layout)
    torch.save({"state_dict": {prefix + name: value for name, value in state.items()}}, tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert same(checkpoint.state_dict, state)
    assert read_checkpoint(checkpoint).layout == layout
    raw = read_weights({prefix + name: value for name, value in state.items()} if "_orig" not in prefix else state)
    assert same(raw.encoder, dict(source.encoder.state_dict()))


def test_what_is_beside_the_network_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a Lightning module has its network, and its loss beside it."""
    source = create_model(ENCODER, num_classes=3).state_dict()
    beside = {"criterion.weight": torch.ones(3), "metric.a.b": torch.ones(1)}
    torch.save(
        {"state_dict": {**{f"model.{name}": value for name, value in source.items()}, **beside}}, tmp_path / "a.pth"
    )
    assert same(load_checkpoint(tmp_path / "a.pth").state_dict, source)
    assert re.search(r"a\.pth: left out, .*: criterion, metric$", caplog.text, re.M)
    torch.save({**source, **beside}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="2 tensors do not belong to a ConvNeXt V2"):
        load_model(tmp_path / "b.pth")


def mmpretrain_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As its tools/model_converters/convnext_to_mmpretrain.py names them, with the shape of its GRN."""
    found = {}
    for name, value in state.items():
        if name.startswith("head."):
            found[name.replace("head.", "head.fc.")] = value
            continue
        new = name.replace("dwconv", "depthwise_conv").replace("pwconv", "pointwise_conv")
        new = new.replace("norm", "norm3") if new.startswith("norm") else new
        found[f"backbone.{new}"] = value.flatten() if "grn" in name else value
    return found


@torch.no_grad()
def test_mmpretrain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = randomised(create_model(ENCODER, num_classes=4))
    state = mmpretrain_names(ours.state_dict())
    assert {"backbone.stages.1.1.pointwise_conv2.bias", "backbone.norm3.weight", "head.fc.bias"} <= state.keys()
    assert same(write_layout(read_weights(ours.state_dict()), "mmpretrain"), state)
    torch.save({"state_dict": state, "meta": {"epoch": 3}}, tmp_path / "classifier.pth")
    assert same(dict(load_model(tmp_path / "classifier.pth").state_dict()), dict(ours.state_dict()))
    last = ours.forward_features(images())
    bare = {name.removeprefix("backbone."): value for name, value in state.items() if not name.startswith("head.")}
    convolutions = {
        name: value[..., None, None] if "pointwise" in name and value.dim() == 2 else value
        for name, value in bare.items()
    }
    norms = {f"backbone.norm{number}.weight": torch.ones(dim) for number, dim in enumerate(ENCODER.dims[:3])}
    segmenter = {name: value for name, value in state.items() if not name.startswith("head.")} | norms
    segmenter |= {"decode_head.conv_seg.weight": torch.ones(2), "auxiliary_head.conv_seg.weight": torch.ones(2)}
    for number, content in enumerate((bare, convolutions, segmenter)):
        torch.save(content, tmp_path / f"{number}.pth")
        assert_starts(tmp_path / f"{number}.pth", last)
    assert "backbone.norm0, backbone.norm1, backbone.norm2 and 2 more" in caplog.text


@torch.no_grad()
@pytest.mark.parametrize("classes", [5, 2])
def test_a_classifier_goes_to_timm_as_pretrained_weights(
    tmp_path: Path, script: Any, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, with another head, with other channels, and as features, in timm's own model."""
    ours = randomised(create_model("convnextv2_atto", num_classes=5))
    save_checkpoint(tmp_path / "ours.safetensors", ours, ours.config)
    monkeypatch.chdir(tmp_path)
    assert (
        script("convert_sparse_to_dense", "ours.safetensors", "timm.safetensors", "--to", "timm", "--no-verify").status
        == 0
    )
    options: dict[str, Any] = {
        "pretrained": True,
        "pretrained_cfg_overlay": {"file": "timm.safetensors", "num_classes": 5},
    }
    theirs = timm.create_model("convnextv2_atto", num_classes=classes, **options).eval()
    features = theirs.forward_features(images())
    torch.testing.assert_close(features, ours.forward_features(images()), rtol=1e-4, atol=1e-4)
    if classes == 5:
        torch.testing.assert_close(theirs(images()), ours(images()), rtol=1e-4, atol=1e-4)
    del options["pretrained"]
    encoder = segmentation_models_pytorch.encoders.get_encoder("tu-convnextv2_atto", weights=True, **options)
    torch.testing.assert_close(encoder.eval()(images())[-1], features, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_encoder_of_segmentation_models_pytorch_both_ways(tmp_path: Path) -> None:
    import convnextv2.timm  # noqa: F401  # registers the name

    ours = randomised(create_model("convnextv2_atto", num_classes=5))
    save_checkpoint(tmp_path / "ours.safetensors", ours, ours.config)
    options = {"pretrained_cfg_overlay": {"file": str(tmp_path / "ours.safetensors")}}
    network = segmentation_models_pytorch.Unet(
        "tu-fcmae_convnextv2_atto", encoder_weights=True, classes=2, decoder_channels=(8, 8, 8, 8, 8), **options
    ).eval()
    side = torch.randn(1, 3, 64, 64)
    last = ours.forward_features(side)
    torch.testing.assert_close(network.encoder(side)[-1], last, rtol=1e-4, atol=1e-4)
    assert network(side).shape == (1, 2, 64, 64)
    torch.save({"model": network.state_dict()}, tmp_path / "segmenter.pth")
    back = create_model("convnextv2_atto", num_classes=3).eval()
    report = init_classifier(back, tmp_path / "segmenter.pth")
    torch.testing.assert_close(back.forward_features(side), last, rtol=1e-4, atol=1e-4)
    assert report.dropped == ()


def test_flat_files_for_small_repositories(tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours = randomised(create_model(ENCODER, num_classes=3))
    torch.save({"model": ours.state_dict(), "epoch": 3, "optimizer": {"state": {}}}, "theirs.pth")
    done = script("convert_sparse_to_dense", "theirs.pth", "flat.pth", "--flat", "--no-verify")
    assert done.status == 0, done.err
    assert "model.load_state_dict(torch.load('flat.pth'))" not in done.out or "['model']" not in done.out
    state = torch.load("flat.pth", weights_only=True)
    assert same(state, dict(ours.state_dict()))
    create_model(ENCODER, num_classes=3).load_state_dict(state, strict=True)
    assert same(dict(load_model("flat.pth").state_dict()), dict(ours.state_dict()))
    (tmp_path / "class_indices.json").write_text(json.dumps({"0": "daisy", "1": "rose", "2": "tulip"}))
    assert load_classifier("flat.pth").classes == ("daisy", "rose", "tulip")
    assert script("convert_sparse_to_dense", "theirs.pth", "flat.pth", "--flat").status == 2
    for output, to in (("a.safetensors", "timm"), ("a.onnx", "onnx")):
        done = script("convert_sparse_to_dense", "theirs.pth", output, "--flat", "--to", to)
        assert done.status == 2
        assert "--flat is for layouts of weights" in done.err
        assert not Path(output).exists()


def test_an_official_sparse_file_in_a_wrapper_is_verified_and_converted(tmp_path: Path, script: Any) -> None:
    """The converter runs the file's own network, by the names that are left."""
    model = randomise(create_fcmae(ENCODER, img_size=128, decoder_dim=8, backend="reference"))
    torch.save({f"net.{name}": value for name, value in sparse_official(model).items()}, tmp_path / "a.pth")
    pyramid = randomise(timm.create_model("convnextv2_tiny", **SMALL, features_only=True))
    torch.save(pyramid.state_dict(), tmp_path / "b.pth")
    for name in "ab":
        done = script(
            "convert_sparse_to_dense", tmp_path / f"{name}.pth", tmp_path / f"{name}.safetensors", "--verbose"
        )
        assert done.status == 0, done.err
        assert "verified: " in done.out


def test_both_spellings_of_a_name_are_no_file_of_timms(tmp_path: Path) -> None:
    """None takes the place of the other in silence."""
    state = timm.create_model("convnextv2_tiny", **SMALL).state_dict()
    torch.save({**state, "stem_0.weight": torch.zeros_like(state["stem.0.weight"])}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"1 tensors do not belong to a ConvNeXt V2 \(stem_0\.weight\)"):
        read_checkpoint(load_checkpoint(tmp_path / "a.pth"))


def test_a_fresh_head_has_not_the_names_of_the_one_before(tmp_path: Path, script: Any) -> None:
    config = transformers.ConvNextV2Config(**SHAPE, id2label={0: "ant", 1: "bee", 2: "cat"})
    transformers.ConvNextV2ForImageClassification(config).save_pretrained(tmp_path / "folder")
    for more, names in (([], ("ant", "bee", "cat")), (["--num-classes", 3], ("0", "1", "2"))):
        output = tmp_path / f"{len(more)}.safetensors"
        assert script("convert_sparse_to_dense", tmp_path / "folder", output, "--no-verify", *more).status == 0
        assert load_classifier(output).classes == names

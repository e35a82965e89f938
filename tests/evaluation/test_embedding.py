"""Features of all images into a file: of checkpoints of every kind, and of encoders in ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from convnextv2 import EncoderConfig, create_fcmae, create_model
from convnextv2.data.sources import DataError
from convnextv2.evaluation import Features, extract_features, load_encoder
from convnextv2.evaluation.embedding import embed, load_embedder
from convnextv2.evaluation.onnx_network import load_onnx
from convnextv2.export import export, source_of
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import ClassifierConfig
from convnextv2.models.pooling import maps_of
from convnextv2.weights import load_checkpoint, save_checkpoint
from convnextv2.weights.guard import CheckpointError

ANY = ["n", 3, "h", "w"]
METADATA = {"img_size": [32, 48], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
Folder = Callable[..., Path]


def randomised(model: nn.Module) -> Any:
    for name, parameter in model.named_parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 and "grn" not in name else 10
        nn.init.normal_(parameter, std=fan**-0.5)
    return model.eval()


@pytest.fixture
def photos(image_folder: Folder) -> Path:
    root = image_folder({"ant": 5, "bee": 4})
    (root / "bee" / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture
def pretrained(tmp_path: Path, tiny_encoder: EncoderConfig) -> Path:
    model = randomised(create_fcmae(tiny_encoder, img_size=(32, 48), decoder_dim=16))
    save_checkpoint(tmp_path / "pre/checkpoints/last.safetensors", model, model.config, METADATA)
    return tmp_path / "pre"


def classifier(tmp_path: Path, encoder: EncoderConfig, pooling: str, classes: int = 2) -> tuple[Path, ConvNeXtV2]:
    model = randomised(ConvNeXtV2(ClassifierConfig(encoder, classes, pooling=pooling)))
    save_checkpoint(tmp_path / "fine.safetensors", model, model.config, METADATA)
    return tmp_path / "fine.safetensors", model


def written(checkpoint: object, data: Path, folder: Path, **options: Any) -> tuple[Any, Any]:
    """The archive, and what was returned."""
    chosen = {name: options.pop(name) for name in ("pooling", "img_size") if name in options}
    embedder = load_embedder(checkpoint, **chosen)  # type: ignore[arg-type]
    done = embed(embedder, embedder.dataset(data), folder / "f.npz", batch_size=4, **options)
    return dict(np.load(folder / "f.npz")), done


@pytest.mark.parametrize(("pooling", "width"), [("mean", 24), ("mean_std", 48), ("stages", 128)])
def test_they_are_those_that_are_evaluated(
    pretrained: Path, photos: Path, tmp_path: Path, pooling: str, width: int
) -> None:
    found, done = written(pretrained, photos, tmp_path, pooling=pooling)
    frozen = load_encoder(pretrained)
    dataset = load_embedder(pretrained).dataset(photos)
    expected = extract_features(frozen.model, dataset, pooling=pooling)
    np.testing.assert_allclose(found["features"], expected.values.numpy(), rtol=1e-5, atol=1e-6)
    assert found["features"].shape == (9, width)
    assert torch.equal(done.values, torch.from_numpy(found["features"]))
    assert found["names"].tolist() == [f"ant/00{n}.png" for n in range(5)] + [f"bee/00{n}.png" for n in range(4)]
    assert found["labels"].tolist() == done.labels.tolist() == [0] * 5 + [1] * 4
    assert (found["classes"].tolist(), found["img_size"].tolist()) == (["ant", "bee"], [32, 48])
    assert (str(found["pooling"]), str(found["data"])) == (pooling, str(photos))
    assert [path.name for path, _ in done.unreadable] == ["broken.png"]
    assert isinstance(done, Features)
    assert done.numbers == tuple(range(9))
    assert "broken.png" not in " ".join(found["names"])


@pytest.mark.parametrize("how", ["mean", "mean_std", "stages"])
def test_as_the_model_pools(tmp_path: Path, tiny_encoder: EncoderConfig, photos: Path, how: str) -> None:
    path, model = classifier(tmp_path, tiny_encoder, how)
    found, _ = written(path, photos, tmp_path, pooling="model")
    dataset = load_embedder(path).dataset(photos)
    with torch.no_grad():
        images = torch.stack([dataset[number][0] for number in range(9)])
        expected = model.forward_head(maps_of(model, images, how), pre_logits=True)
        logits = torch.from_numpy(found["features"]) @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(torch.from_numpy(found["features"]), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)
    assert str(found["pooling"]) == f"{how}, norm"


def test_a_pretrained_encoder_as_the_model_is_its_mean(pretrained: Path, photos: Path, tmp_path: Path) -> None:
    plain, _ = written(pretrained, photos, tmp_path)
    found, _ = written(pretrained, photos, tmp_path, pooling="model")
    assert np.array_equal(found["features"], plain["features"])
    assert str(found["pooling"]) == "mean"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_of_every_patch(pretrained: Path, photos: Path, tmp_path: Path, dtype: str) -> None:
    found, done = written(pretrained, photos, tmp_path, per_patch=True, pooling="mean_std", dtype=dtype)
    assert (found["features"].shape, found["features"].dtype) == ((9, 2, 3, 24), dtype)
    assert (str(found["pooling"]), bool(found["per_patch"])) == ("none", True)
    model, dataset = load_encoder(pretrained).model, load_embedder(pretrained).dataset(photos)
    with torch.no_grad():
        maps = model.forward_features(torch.stack([dataset[number][0] for number in range(9)]))
    expected = maps.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found["features"], expected, rtol=0, atol=1e-5 if dtype == "float32" else 1e-3)
    torch.testing.assert_close(done.values, torch.cat((maps.mean((2, 3)), maps.std((2, 3), correction=0)), 1))


def test_nothing_is_kept_unless_it_is_asked_for(pretrained: Path, photos: Path, tmp_path: Path) -> None:
    _, done = written(pretrained, photos, tmp_path, keep=False)
    assert (done.values.shape, len(done)) == ((9, 0), 9)


@pytest.mark.slow
def test_an_encoder_in_an_onnx_file(pretrained: Path, photos: Path, tmp_path: Path) -> None:
    export(source_of(load_checkpoint(pretrained)), "onnx", tmp_path / "encoder.onnx", check=False)
    plain, _ = written(pretrained, photos, tmp_path, pooling="mean_std")
    found, _ = written(tmp_path / "encoder.onnx", photos, tmp_path, pooling="mean_std")
    error = np.abs(found["features"] - plain["features"]).max() / np.abs(plain["features"]).max()
    assert error < 1e-5
    for entry in ("mean", "std", "img_size", "names", "labels"):
        assert np.array_equal(found[entry], plain[entry]), entry
    with pytest.raises(ValueError, match="gives the map of the last stage alone"):
        written(tmp_path / "encoder.onnx", photos, tmp_path, pooling="stages")
    found, _ = written(tmp_path / "encoder.onnx", photos, tmp_path, img_size=(48, 48), per_patch=True)
    assert found["features"].shape == (9, 3, 3, 24)


@pytest.mark.slow
def test_native_images_are_read_alike_from_an_onnx_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_fcmae(EncoderConfig((1, 1, 1, 1), (8, 8, 16, 16)), img_size=64, decoder_dim=8)
    said = {"mean": [1800.0] * 3, "std": [90.0] * 3, "img_size": [64, 64], "pixels": "native", "crop": "area"}
    save_checkpoint(tmp_path / "a.safetensors", model, model.config, said)
    (tmp_path / "in").mkdir()
    for number in range(3):
        values = np.random.default_rng(number).integers(1600, 2000, (64, 64, 3)).astype(np.uint16)
        np.save(tmp_path / "in" / f"{number}.npy", values)
    export(source_of(load_checkpoint(tmp_path / "a.safetensors")), "onnx", tmp_path / "a.onnx", check=False)
    plain, _ = written(tmp_path / "a.safetensors", tmp_path / "in", tmp_path)
    found, _ = written(tmp_path / "a.onnx", tmp_path / "in", tmp_path)
    assert np.ptp(plain["features"], axis=0).max() > 1e-3
    np.testing.assert_allclose(found["features"], plain["features"], rtol=0, atol=1e-5)


def graph(
    path: Path, shape: list[Any], outputs: dict[str, list[Any]], kind: int = TensorProto.FLOAT, **said: str
) -> Path:
    """An ONNX file of somebody: outputs are its input, or the mean over height and width where they have two axes."""
    nodes = [
        helper.make_node("Identity", ["pixels"], [name])
        if len(axes) == len(shape)
        else helper.make_node("ReduceMean", ["pixels"], [name], axes=[2, 3], keepdims=0)
        for name, axes in outputs.items()
    ]
    made = helper.make_graph(
        nodes,
        "somebody",
        [helper.make_tensor_value_info("pixels", kind, shape)],
        [helper.make_tensor_value_info(name, kind, axes) for name, axes in outputs.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(model, said)
    onnx.save(model, path)
    return path


def test_files_of_others(tmp_path: Path, photos: Path) -> None:
    """A map alone, a fixed batch and a fixed size; without metadata, ImageNet's statistics."""
    path = graph(tmp_path / "a.onnx", [4, 3, 16, 24], {"last_hidden_state": [4, 3, 16, 24]})
    found, done = written(path, photos, tmp_path)
    dataset = load_embedder(path).dataset(photos)
    assert dataset.shape == (3, 16, 24)
    expected = torch.stack([dataset[number][0] for number in range(9)]).mean((2, 3))
    torch.testing.assert_close(done.values, expected, rtol=1e-5, atol=1e-6)
    assert found["mean"].tolist() == [0.485, 0.456, 0.406]
    with pytest.raises(ValueError, match=r"takes images of 16×24 pixels, not of 32×32; say its size"):
        load_onnx(path, img_size=(32, 32))
    path = graph(
        tmp_path / "b.onnx", ["n", 3, "h", "w"], {"x": ["n", 3, "h", "w"], "features": ["n", 3]}, img_size="[8]"
    )
    assert written(path, photos, tmp_path)[0]["img_size"].tolist() == [8, 8]
    assert load_onnx(path, img_size=(8, 16)).preprocessing[2] == (8, 16)


@pytest.mark.parametrize("pooling", [None, "model"])
def test_features_that_are_pooled_in_the_file(tmp_path: Path, photos: Path, pooling: str | None) -> None:
    path = graph(tmp_path / "a.onnx", ANY, {"features": ["n", 3]}, img_size="[16, 24]")
    found, done = written(path, photos, tmp_path, pooling=pooling)
    dataset = load_embedder(path).dataset(photos)
    expected = torch.stack([dataset[number][0] for number in range(9)]).mean((2, 3))
    torch.testing.assert_close(done.values, expected, rtol=1e-5, atol=1e-6)
    assert str(found["pooling"]) == "of the file"
    with pytest.raises(ValueError, match="pooled already; take the pooling model"):
        load_embedder(path, pooling="mean")
    with pytest.raises(ValueError, match="have no patches"):
        written(path, photos, tmp_path, per_patch=True)


@pytest.mark.parametrize(
    ("shape", "outputs", "options", "message"),
    [
        (ANY, {"logits": ["n", 3]}, {}, r"gives logits \['n', 3\], a classifier's answers, and no features; give the"),
        (ANY, {"logits": ANY}, {}, "a classifier's answers"),
        (ANY, {"probabilities": ["n", 3]}, {}, r"expected an output called 'features'"),
        (ANY, {"a": ANY, "b": ANY}, {}, r"expected an output called 'features'"),
        (["n", "c", "h", "w"], {"features": ANY}, {}, r"expected one input, images \[batch, channels, height, width\]"),
        (["n", 3], {"features": ["n", 3]}, {}, "expected one input"),
        (ANY, {"features": ANY}, {"kind": TensorProto.DOUBLE}, "expected one input"),
        (ANY, {"features": ANY}, {"mean": "[1, 2]", "std": "[1, 2]"}, "3"),
        (ANY, {"features": ANY}, {"std": "[0, 0, 0]", "mean": "[0, 0, 0]"}, "std"),
        (ANY, {"features": ANY}, {"img_size": "a\nb"}, "img_size"),
        (["n", 7, "h", "w"], {"features": ["n", 7, "h", "w"]}, {}, "does not say the mean and std of its 7 channels"),
    ],
)
def test_onnx_files_that_are_refused(
    tmp_path: Path, shape: list[Any], outputs: dict[str, list[Any]], options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "x.onnx"
    graph(path, shape, outputs, **options)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_onnx(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_onnx_files_that_are_none(tmp_path: Path) -> None:
    good = graph(tmp_path / "good.onnx", ANY, {"features": ANY}).read_bytes()
    for content in (b"", b"text", good[: len(good) // 2], good[:-3] + b"\xff\xff\xff", bytes(1000)):
        (tmp_path / "x.onnx").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.onnx: ") as caught:
            load_onnx(tmp_path / "x.onnx")
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such file"):
        load_onnx(tmp_path / "nowhere.onnx")


def test_what_is_refused(pretrained: Path, photos: Path, tmp_path: Path, tiny_encoder: EncoderConfig) -> None:
    with pytest.raises(ValueError, match="pooling must be one of mean, mean_std, stages, model, got 'max'"):
        load_embedder(pretrained, pooling="max")
    with pytest.raises(ValueError, match="written as float32 or float16, got 'int8'"):
        written(pretrained, photos, tmp_path, dtype="int8")
    with pytest.raises(DataError, match=r"none of the 1 images can be read: .*broken\.png: "):
        written(pretrained, photos / "bee" / "broken.png", tmp_path)
    path, model = classifier(tmp_path, tiny_encoder, "mean")
    with torch.no_grad():
        model.stages[3][0].pwconv2.bias += 1e5
    save_checkpoint(path, model, model.config, METADATA)
    with pytest.raises(
        CheckpointError, match=r"features of ant/000\.png are NaN or infinite in float16: .*float32 holds"
    ):
        written(path, photos, tmp_path, dtype="float16")
    assert not (tmp_path / "f.npz").exists()
    assert np.isfinite(written(path, photos, tmp_path)[0]["features"]).all()


def test_images_that_are_no_files(tmp_path: Path) -> None:
    encoder = EncoderConfig((1, 1, 1, 1), (8, 8, 8, 8), in_chans=1, patch_size=8)
    model = create_model(encoder, num_classes=0)
    save_checkpoint(tmp_path / "x.pth", model, model.config, {"img_size": [32, 32]})
    embedder = load_embedder(tmp_path / "x.pth")
    done = embed(embedder, embedder.dataset("digits"), tmp_path / "f.npz", batch_size=600)
    assert done.values.shape == (1797, 8)
    assert done.classes == tuple("0123456789")

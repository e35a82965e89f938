"""The network: every decoder on every patch size, against timm and segmentation-models-pytorch; its checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn

import convnextv2.timm
from convnextv2 import ClassifierConfig, ConvNeXtV2, EncoderConfig, create_fcmae
from convnextv2.models.config import PATCH_SIZES, config_from_dict, config_to_dict
from convnextv2.segmentation import Segmenter, SegmenterConfig, init_segmenter, load_segmenter
from convnextv2.segmentation.config import DECODERS
from convnextv2.segmentation.network import library
from convnextv2.weights import CheckpointError, read_weights, save_checkpoint, with_norm, write_layout
from convnextv2.weights.checkpoint import load_checkpoint
from sparse_ops.grid import DenseGrid

ENCODER = EncoderConfig((1, 1, 2, 1), (8, 16, 16, 24), patch_size=16)
NAMES = ("ground", "disc", "square")


def random_weights(model: nn.Module) -> Any:
    """GRN starts at zero, and would hide what lies behind it."""
    for name, parameter in model.named_parameters():
        if ".grn." in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def segmenter(decoder: str = "upernet", names: tuple[str, ...] = NAMES, **changes: Any) -> Any:
    return random_weights(Segmenter(SegmenterConfig(replace(ENCODER, **changes), decoder, 64, names)))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_every_decoder_takes_every_patch_size(decoder: str, patch_size: int) -> None:
    model = segmenter(decoder, patch_size=patch_size)
    images = torch.randn(2, 3, 64, 96)
    logits = model(images)
    assert logits.shape == (2, 3, 64, 96)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    stages = [block[0].dwconv.weight.grad for block in model.encoder.stages]
    assert all(gradient.abs().max() > 0 for gradient in stages)  # each map is used, that of the first stage too
    odd = torch.randn(1, 3, 41, 50)
    filled = nn.functional.pad(odd, (0, -50 % patch_size, 0, -41 % patch_size))
    assert torch.equal(model(odd), model(filled)[..., :41, :50])


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_image_does_not_depend_on_others_of_its_batch(decoder: str) -> None:
    model = segmenter(decoder).train()
    images = torch.randn(3, 3, 64, 64)
    together = model(images)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    torch.testing.assert_close(together[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
def test_smp_and_timm_have_our_features(patch_size: int, tmp_path: Path) -> None:
    """The encoder of smp that takes any of timm's, ``features_only``, and ours, from one file."""
    variant = convnextv2.timm.registered_name("convnextv2_atto", patch_size)
    config = EncoderConfig((1, 1, 1, 1), (8, 16, 16, 24), patch_size=patch_size)
    ours = random_weights(ConvNeXtV2(ClassifierConfig(config, 0)))
    save_checkpoint(tmp_path / "x.safetensors", ours, ours.config)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = [features for features, _ in ours.forward_stages(images, DenseGrid(2))]
        shape: dict[str, Any] = {"depths": config.depths, "dims": config.dims}
        pyramid = timm.create_model(variant, features_only=True, checkpoint_path=tmp_path / "x.safetensors", **shape)
        depth = {32: 5, 16: 4, 8: 3}[patch_size]
        encoder = smp.encoders.get_encoder(f"tu-{variant}", depth=depth, **shape)
        encoder.model.load_state_dict(ours.state_dict())
        found = {"timm": pyramid.eval()(images), "smp": encoder.eval()(images)[-4:]}
    for name, maps in found.items():
        assert len(maps) == 4
        for one, other in zip(maps, expected, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm(), name


def test_the_decoder_is_the_librarys() -> None:
    """Logits of smp's own UPerNet with our weights; its norm in place of ours."""
    model = segmenter(patch_size=32).double()
    shape: dict[str, Any] = {"depths": ENCODER.depths, "dims": ENCODER.dims}
    name = convnextv2.timm.registered_name("convnextv2_atto")
    theirs = smp.UPerNet(f"tu-{name}", encoder_weights=None, decoder_channels=64, classes=3, **shape).double().eval()
    for path, module in list(theirs.decoder.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, last = path.rpartition(".")
            setattr(theirs.decoder.get_submodule(parent), last, nn.GroupNorm(8, module.num_features).double())
    theirs.decoder.load_state_dict(model.decoder.state_dict())
    theirs.segmentation_head[0].load_state_dict(model.head.state_dict())
    theirs.encoder.model.load_state_dict(model.encoder.state_dict())
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        maps = theirs.segmentation_head[0](theirs.decoder(theirs.encoder(images)))
        expected = nn.functional.interpolate(maps, (64, 96), mode="bilinear")
        found = model(images)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("layout", ["fcmae", "official-dense", "sparse-official", "timm", "transformers"])
def test_it_starts_from_a_file_of_any_layout(layout: str, tmp_path: Path) -> None:
    encoder = replace(ENCODER, patch_size=32)
    source = random_weights(create_fcmae(encoder, img_size=(64, 64), decoder_dim=16))
    weights = read_weights(source.state_dict())
    state = write_layout(with_norm(weights) if layout in ("timm", "transformers") else weights, layout)
    torch.save(state, tmp_path / "x.pth")
    model = segmenter(patch_size=32, drop_path_rate=0.2)
    told = init_segmenter(model, tmp_path / "x.pth")
    assert told.endswith("tensors loaded; freshly initialised: decoder, head")
    own = model.encoder.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in weights.encoder.items())
    assert "stem" in init_segmenter(segmenter(), tmp_path / "x.pth")  # of patch size 16: adapted
    with pytest.raises(CheckpointError, match=r"x.pth: holds "):
        init_segmenter(segmenter(patch_size=32, dims=(8, 16, 16, 32)), tmp_path / "x.pth")


def test_it_starts_from_another_segmenter(tmp_path: Path) -> None:
    def loaded(model: Any) -> tuple[str, set[str]]:
        told = init_segmenter(model, tmp_path / "x.safetensors")
        state = model.state_dict()
        return told.partition("initialised: ")[2], {name for name in state if not torch.equal(state[name], there[name])}

    source = segmenter("fpn")
    there = source.state_dict()
    save_checkpoint(tmp_path / "x.safetensors", source, source.config)
    assert loaded(segmenter("fpn")) == ("nothing", set())
    assert loaded(segmenter("fpn", ("a", "disc", "square"))) == ("head", {"head.weight"})
    told = init_segmenter(segmenter("unet"), tmp_path / "x.safetensors")
    assert told.endswith("initialised: decoder, head")


def test_a_unet_of_another_stem_gives_its_encoder_alone(tmp_path: Path) -> None:
    """Above a stem of stride 4 it has a block more."""
    source = segmenter("unet", patch_size=16)
    save_checkpoint(tmp_path / "x.safetensors", source, source.config)
    for patch_size, new in ((16, "nothing"), (8, "nothing"), (32, "decoder, head")):
        told = init_segmenter(segmenter("unet", patch_size=patch_size), tmp_path / "x.safetensors")
        assert f"initialised: {new}" in told, patch_size


def test_its_file_rebuilds_it(tmp_path: Path) -> None:
    model = segmenter("unet", patch_size=8, in_chans=5, drop_path_rate=0.1)
    about = {"mean": [0.1] * 5, "std": [2.0] * 5, "img_size": [48, 64], "class_values": [0, 7, 255], "ignore_index": 9}
    save_checkpoint(tmp_path / "x.safetensors", model, model.config, about)
    found = load_segmenter(tmp_path / "x.safetensors")
    assert found.model.config == model.config
    assert (found.classes.names, found.classes.values, found.classes.ignored) == (NAMES, (0, 7, 255), 9)
    assert (found.statistics, found.window) == (((0.1,) * 5, (2.0,) * 5), (48, 64))
    images = torch.randn(1, 5, 48, 64)
    assert torch.equal(found.model(images), model(images))
    with pytest.raises(ValueError, match="not divisible by the patch size 8"):
        load_segmenter(tmp_path / "x.safetensors", window=(50, 64))


def damaged(state: dict[str, Tensor], config: dict[str, Any], about: dict[str, Any], how: str) -> None:
    if how == "encoder":
        config["encoder"]["depths"] = [1, 1, 3, 1]
    elif how == "width":
        config["decoder_width"] = 128
    elif how == "classes":
        config["class_names"] = ["a", "b"]
    elif how == "decoder":
        config["decoder"] = "fpn"
    elif how == "missing":
        del state["decoder.psp.out_conv.0.weight"]
    elif how == "values":
        about["class_values"] = [0, 0, 1]
    elif how == "huge":
        config["decoder_width"] = 2**40
    elif how == "names":
        config["class_names"] = [1, 2, 3]
    else:
        about["ignore_index"] = "all"


@pytest.mark.parametrize(
    "how", ["encoder", "width", "classes", "decoder", "missing", "values", "huge", "names", "ignored"]
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(how: str, tmp_path: Path) -> None:
    model = segmenter()
    state, config, about = dict(model.state_dict()), config_to_dict(model.config), {"img_size": [32, 32]}
    damaged(state, config, about, how)
    torch.save({"model": state, "config": config, "metadata": about}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as error:
        load_segmenter(tmp_path / "x.pth")
    assert str(error.value).startswith(f"{tmp_path / 'x.pth'}: ")
    assert "\n" not in str(error.value)


def test_other_networks_are_told_apart(tmp_path: Path) -> None:
    classifier = ConvNeXtV2(ClassifierConfig(ENCODER, 3))
    save_checkpoint(tmp_path / "c.pth", classifier, classifier.config)
    with pytest.raises(CheckpointError, match=r"c.pth: is of no segmentation; train one from it"):
        load_segmenter(tmp_path / "c.pth")
    model = segmenter()
    save_checkpoint(tmp_path / "s.pth", model, model.config)
    assert load_checkpoint(tmp_path / "s.pth").config == model.config
    assert config_from_dict(config_to_dict(model.config)) == model.config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder": "deeplab"}, "decoder must be one of upernet, fpn, unet"),
        ({"decoder_width": 100}, "a multiple of 64"),
        ({"decoder_width": True}, "a multiple of 64"),
        ({"class_names": ("a",)}, "2 to 255 classes, got 1"),
        ({"class_names": tuple(map(str, range(256)))}, "2 to 255 classes, got 256"),
    ],
)
def test_wrong_shapes_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SegmenterConfig(**{"encoder": ENCODER, "class_names": NAMES, **changes})


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "segmentation_models_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install 'sparse-fcmae\[segment\]'"):
        library()

"""``import convnextv2.timm``: our networks under names of timm's, in timm's interface, from files of every layout."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import timm
import torch
from accelerate import init_empty_weights
from timm.optim import create_optimizer_v2
from torchvision.ops import FeaturePyramidNetwork
from weights_helpers import ENCODER, fcmae, randomise, sparse_official

import convnextv2.timm
from convnextv2 import VARIANTS, ClassifierConfig, ConvNeXtV2, create_fcmae, create_model
from convnextv2.models.config import encoder_config
from convnextv2.weights import CheckpointError, read_weights, save_checkpoint, with_norm, write_layout
from sparse_ops.grid import DenseGrid

SMALL = {"depths": ENCODER.depths, "dims": ENCODER.dims}
ATTO = "fcmae_convnextv2_atto"


def classifier(**changes: object) -> ConvNeXtV2:
    return randomise(create_model(replace(ENCODER, **changes), num_classes=5))


def images(side: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, side, side + 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "checkpoint.safetensors")


def test_stems_of_other_types_are_timms_or_refused():
    own, theirs = (
        timm.create_model(name, features_only=True, stem_type="overlap").feature_info.reduction()
        for name in (ATTO, "convnextv2_atto")
    )
    assert own == theirs
    with pytest.raises(ValueError, match="'overlap' is of patch size 32 alone, got 16"):
        timm.create_model(f"{ATTO}_patch16", stem_type="overlap")
    with pytest.raises(ValueError, match="one size as kernel_sizes"):
        timm.create_model(ATTO, kernel_sizes=(3, 5, 7, 7))


def test_names_are_registered():
    assert timm.is_model(ATTO)
    assert set(timm.list_models("fcmae_*")) == {
        f"fcmae_{variant}{end}" for variant in VARIANTS for end in ("", "_patch16", "_patch8")
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_takes_the_files_of_timms_own(variant):
    with init_empty_weights():
        ours, theirs = timm.create_model(f"fcmae_{variant}"), timm.create_model(variant)
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    assert [block.norm.eps for block in ours.stages[0].blocks] == [block.norm.eps for block in theirs.stages[0].blocks]


@pytest.mark.parametrize("patch_size", [32, 16, 8])
@pytest.mark.parametrize("features_only", [False, True])
def test_our_file_is_loaded_by_timm_and_computes_the_same(path, patch_size, features_only):
    model = classifier(patch_size=patch_size)
    save_checkpoint(path, model, model.config)
    options = {**SMALL, "patch_size": patch_size, "checkpoint_path": path}
    if not features_only:
        theirs = timm.create_model(ATTO, num_classes=5, **options).double().eval()
        torch.testing.assert_close(theirs(images()), model(images()), rtol=0, atol=1e-6)
        return
    theirs = timm.create_model(ATTO, features_only=True, out_indices=(0, 2, 3), **options).double().eval()
    stride = patch_size // 8
    assert theirs.feature_info.reduction() == [stride, 4 * stride, 8 * stride]
    assert theirs.feature_info.channels() == [8, 16, 24]
    expected = [features for features, _ in model.forward_stages(images(), DenseGrid(2))]
    for actual, stage in zip(theirs(images()), (0, 2, 3), strict=True):
        torch.testing.assert_close(actual, expected[stage], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["fcmae", "official-dense", "sparse-official", "timm", "transformers"])
def test_files_of_every_layout(path, layout):
    source = fcmae() if layout in ("fcmae", "sparse-official") else classifier()
    weights = with_norm(read_weights(source.state_dict()))
    state = sparse_official(source) if layout == "sparse-official" else write_layout(weights, layout)
    save_checkpoint(path, state, None)
    theirs = timm.create_model(ATTO, **SMALL, features_only=True, checkpoint_path=path).double().eval()
    encoder = source.encoder if layout in ("fcmae", "sparse-official") else source
    expected = encoder.forward_features(images(), DenseGrid(2))
    torch.testing.assert_close(theirs(images())[-1], expected, rtol=1e-5, atol=1e-5)


def test_timms_own_network_agrees_with_ours_registered(path):
    """Somebody else's network and names on both sides of a file that ours wrote."""
    with torch.no_grad():
        ours = timm.create_model(ATTO, num_classes=3).eval()
        for parameter in ours.parameters():
            parameter.normal_(std=0.1)
        torch.save(ours.state_dict(), path.replace(".safetensors", ".pth"))
        theirs = timm.create_model("convnextv2_atto", num_classes=3, checkpoint_path=path.replace("safetensors", "pth"))
        assert torch.equal(theirs.eval()(images().float()), ours(images().float()))


def test_a_pretrained_encoder_starts_a_classifier_and_says_so(path, caplog):
    save_checkpoint(path, fcmae(), fcmae().config)
    model = timm.create_model(ATTO, **SMALL, num_classes=4, checkpoint_path=path)
    assert "the file has no head.norm.weight, head.norm.bias, head.fc.weight, head.fc.bias" in caplog.text
    assert model(images().float()).shape == (2, 4)
    assert torch.equal(model.stem[0].weight, fcmae().encoder.downsample_layers[0][0].weight.float())


def test_a_head_of_other_classes_goes_with_pretrained_and_not_with_checkpoint_path(path):
    model = classifier()
    save_checkpoint(path, model, model.config)
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.fc\.weight"):
        timm.create_model(ATTO, **SMALL, num_classes=3, checkpoint_path=path)
    file = {"file": path}
    theirs = timm.create_model(ATTO, **SMALL, num_classes=3, pretrained=True, pretrained_cfg_overlay=file)
    assert torch.equal(theirs.stem[0].weight, model.downsample_layers[0][0].weight.float())
    assert theirs.head.fc.out_features == 3


def test_channels_are_adapted_as_timm_does(path):
    model = classifier()
    save_checkpoint(path, model, model.config)
    file = {"file": path}
    theirs = timm.create_model(ATTO, **SMALL, in_chans=1, pretrained=True, num_classes=2, pretrained_cfg_overlay=file)
    expected = model.downsample_layers[0][0].weight.float().sum(1, keepdim=True)
    torch.testing.assert_close(theirs.stem[0].weight, expected)
    with pytest.raises(RuntimeError, match=r"size mismatch for stem\.0\.weight"):
        timm.create_model(ATTO, **SMALL, in_chans=1, num_classes=5, checkpoint_path=path)


def test_another_network_is_told_in_one_line(path):
    model = classifier(patch_size=16)
    save_checkpoint(path, model, model.config)
    with pytest.raises(CheckpointError, match=r"^the file holds .*patch size 16\), but the network is .*patch size 32"):
        timm.create_model(ATTO, **SMALL, checkpoint_path=path)
    pooled = ConvNeXtV2(ClassifierConfig(ENCODER, 5, pooling="mean_std"))
    save_checkpoint(path, pooled, pooled.config)
    with pytest.raises(CheckpointError, match="timm's by the mean alone"):
        timm.create_model(ATTO, **SMALL, num_classes=5, checkpoint_path=path)
    state = {name: value for name, value in model.state_dict().items() if name != "stages.0.0.norm.bias"}
    save_checkpoint(path, state, None)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(stages\.0\.0\.norm\.bias\)"):
        timm.create_model(ATTO, **SMALL, patch_size=16, checkpoint_path=path)
    torch.save({"conv1.weight": torch.ones(2)}, path.replace(".safetensors", ".pth"))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        timm.create_model(ATTO, **SMALL, checkpoint_path=path.replace(".safetensors", ".pth"))


@pytest.mark.parametrize("features_only", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(features_only):
    model = randomise(timm.create_model(ATTO, **SMALL, features_only=features_only)).train()
    recomputing = copy.deepcopy(model)
    recomputing.set_grad_checkpointing()
    calls = []
    block = (recomputing.model if features_only else recomputing).stages[0].blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    for own in (model, recomputing):
        outputs = own(images()) if features_only else [own(images())]
        sum(output.square().mean() for output in outputs).backward()
    assert len(calls) == 2
    for (name, one), two in zip(model.named_parameters(), recomputing.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_the_rest_of_timms_interface():
    model = timm.create_model(ATTO, **SMALL, num_classes=5, drop_path_rate=0.1, global_pool="")
    assert model.get_classifier() is model.head.fc
    assert model(images().float()).shape == (2, 5, 2, 3)
    model.reset_classifier(3, "avg")
    assert model.get_classifier().out_features == model.num_classes == 3
    assert model(images().float()).shape == (2, 3)
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if "grn" in name}
    assert len(model.no_weight_decay()) == 2 * sum(ENCODER.depths)
    groups = create_optimizer_v2(model, "adamw", weight_decay=0.05, layer_decay=0.5).param_groups
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    layers = [model.head.fc, model.stages[3].blocks[0].mlp.fc1, model.stages[0].blocks[0].mlp.fc1, model.stem[0]]
    assert [scales[id(layer.weight)] for layer in layers] == [1, 0.5, 0.5**5, 0.5**6]
    model.load_state_dict(copy.deepcopy(model).state_dict())
    for name, options in (("output_stride", {"output_stride": 4}), ("patch_size", {"patch_size": 4})):
        with pytest.raises(ValueError, match=name):
            timm.create_model(ATTO, **options)


@pytest.mark.parametrize(
    ("patch_size", "output_stride", "reductions"), [(32, 16, [4, 8, 16, 16]), (16, 8, [2, 4, 8, 8])]
)
def test_dilated_in_place_of_striding(patch_size, output_stride, reductions):
    options = {"patch_size": patch_size, "output_stride": output_stride, "features_only": True}
    model = timm.create_model(ATTO, **SMALL, **options)
    assert model.feature_info.reduction() == reductions
    assert [64 // features.shape[2] for features in model(images().float())] == reductions


def test_as_the_backbone_of_a_feature_pyramid_of_torchvision():
    backbone = timm.create_model(f"{ATTO}_patch16", **SMALL, features_only=True)
    features, strides = backbone(images().float()), backbone.feature_info.reduction()
    named = OrderedDict((str(stride), value) for stride, value in zip(strides, features, strict=True))
    pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), 4)(named)
    assert {name: value.shape[1:] for name, value in pyramid.items()} == {
        str(stride): (4, 64 // stride, 96 // stride) for stride in (2, 4, 8, 16)
    }


def test_a_variant_is_our_encoder(path):
    model = create_fcmae("convnextv2_atto", img_size=32, patch_size=8)
    save_checkpoint(path, model, model.config)
    theirs = timm.create_model(f"{ATTO}_patch8", features_only=True, checkpoint_path=path)
    assert theirs.model.encoder_config == encoder_config("convnextv2_atto", patch_size=8)
    assert convnextv2.timm.NAMES[f"{ATTO}_patch8"] == ("convnextv2_atto", 8)

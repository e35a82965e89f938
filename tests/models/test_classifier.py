import copy
import pickle

import pytest
import torch
from model_helpers import images_for, randomise, tiny_config, tiny_fcmae
from torch import nn

from convnextv2 import ConvNeXtV2, create_model
from convnextv2.weights.reading import read_weights, write_layout
from sparse_ops.oracle import visible_from_text

VISIBLE = visible_from_text("..../....", "..../....")


def tiny_classifier(**options) -> ConvNeXtV2:
    model = create_model(tiny_config(patch_size=16), **{"num_classes": 7, **options})
    randomise(model)
    return model.eval()


def test_logits_and_features():
    model, images = tiny_classifier(), images_for(VISIBLE)
    features = model.forward_features(images)
    pooled = nn.functional.layer_norm(features.mean((2, 3)), (24,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(model(images), pooled @ model.head.weight.t() + model.head.bias)


def test_no_classes_gives_pooled_features():
    model, images = tiny_classifier(num_classes=0), images_for(VISIBLE)
    assert isinstance(model.head, nn.Identity)
    assert torch.equal(model(images), model.forward_head(model.forward_features(images), pre_logits=True))


def test_head_can_be_replaced_and_scaled():
    torch.manual_seed(0)
    model = create_model(tiny_config(), num_classes=500)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    model.reset_classifier(400, head_init_scale=0.001)
    assert model.head.weight.shape == (400, 24)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert model.head.bias.abs().max() == 0
    scaled = create_model(tiny_config(), num_classes=400, head_init_scale=0.001)
    assert scaled.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)


def test_pretrained_encoder_loads_but_for_norm_and_head():
    pretrained, model = tiny_fcmae(), tiny_classifier()
    missing, unexpected = model.load_state_dict(pretrained.encoder.state_dict(), strict=False)
    assert sorted(missing) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert unexpected == []
    images = images_for(VISIBLE)
    assert torch.equal(model.forward_features(images), pretrained.encoder(images))


def test_state_dict_has_the_official_dense_names_and_shapes():
    shapes = {name: tuple(value.shape) for name, value in tiny_classifier().state_dict().items()}
    assert shapes["downsample_layers.0.0.weight"] == (8, 3, 2, 2)
    assert shapes["downsample_layers.0.1.weight"] == (8,)
    assert shapes["downsample_layers.1.0.weight"] == (8,)
    assert shapes["downsample_layers.1.1.weight"] == (16, 8, 2, 2)
    assert shapes["stages.2.1.dwconv.weight"] == (16, 1, 7, 7)
    assert shapes["stages.2.1.pwconv1.weight"] == (64, 16)
    assert shapes["stages.2.1.grn.gamma"] == (1, 1, 1, 64)
    assert shapes["stages.2.1.pwconv2.weight"] == (16, 64)
    prefixes = {name.split(".")[0] for name in shapes}
    assert prefixes == {"downsample_layers", "stages", "norm", "head"}


def test_options_reach_the_encoder():
    model = create_model("convnextv2_atto", num_classes=2, in_chans=1, patch_size=8, drop_path_rate=0.3)
    config = model.config.encoder
    assert (config.in_chans, config.patch_size, config.drop_path_rate) == (1, 8, 0.3)
    assert model(torch.zeros(1, 1, 8, 16)).shape == (1, 2)


def test_wrong_images_are_refused():
    model = tiny_classifier()
    with pytest.raises(ValueError, match="15 × 32 is smaller than the patch size 16"):
        model(torch.zeros(1, 3, 15, 32))
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\], got \(1, 1, 32, 32\)"):
        model(torch.zeros(1, 1, 32, 32))


def test_copies_and_pickles_compute_the_same():
    model, images = tiny_classifier(), images_for(VISIBLE)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(images), model(images))


def test_autocast_trains_near_float32():
    model, images = tiny_classifier(), images_for(VISIBLE)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    logits.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("size", [(100, 100), (250, 250), (299, 411), (33, 63)])
def test_any_size_is_taken_as_timm_takes_it(size):
    """What does not fill a cell is left out, at every stride."""
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model("convnextv2_atto", num_classes=5).eval()
    torch.nn.init.normal_(theirs.head.norm.bias)
    for name, parameter in theirs.named_parameters():
        if ".grn." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    ours = create_model("convnextv2_atto", num_classes=5).eval()
    ours.load_state_dict(write_layout(read_weights(theirs.state_dict()), "official-dense"))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
        features = theirs.forward_features(images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert ours.forward_features(images).shape == features.shape

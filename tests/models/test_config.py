import json

import pytest
import torch

import convnextv2
from convnextv2 import VARIANTS, ClassifierConfig, EncoderConfig, FCMAEConfig, create_fcmae, create_model
from convnextv2.models.config import GRN_SCOPES, config_from_dict, config_to_dict, encoder_config, variant_name
from sparse_ops import grid

CLASSIFIER_PARAMETERS = {
    "convnextv2_atto": 3_708_400,
    "convnextv2_femto": 5_233_240,
    "convnextv2_pico": 9_066_280,
    "convnextv2_nano": 15_623_800,
    "convnextv2_tiny": 28_635_496,
    "convnextv2_base": 88_717_800,
    "convnextv2_large": 197_956_840,
    "convnextv2_huge": 660_289_640,
}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", CLASSIFIER_PARAMETERS)
def test_classifier_parameters(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        assert count(create_model(name)) == CLASSIFIER_PARAMETERS[name]
        assert count(getattr(convnextv2, name)(num_classes=1000)) == CLASSIFIER_PARAMETERS[name]
        assert count(timm.create_model(name, num_classes=1000)) == CLASSIFIER_PARAMETERS[name]


@pytest.mark.parametrize("name", CLASSIFIER_PARAMETERS)
def test_fcmae_parameters(name):
    width, dim, pixels = 512, VARIANTS[name][1][-1], 32 * 32 * 3
    encoder = CLASSIFIER_PARAMETERS[name] - 2 * dim - (dim + 1) * 1000
    block = (49 + 1) * width + 2 * width + (width + 1) * 4 * width + 2 * 4 * width + (4 * width + 1) * width
    decoder = (dim + 1) * width + width + block + (width + 1) * pixels
    with torch.device("meta"):
        model = create_fcmae(name)
    assert count(model) == encoder + decoder
    if name == "convnextv2_pico":
        assert count(model) == 12_521_792


def test_variant_names():
    assert len(CLASSIFIER_PARAMETERS) == 8
    assert VARIANTS.keys() >= CLASSIFIER_PARAMETERS.keys()
    assert convnextv2.__all__[-len(VARIANTS) :] == list(VARIANTS)
    for name in VARIANTS:
        config = encoder_config(name)
        assert encoder_config(name.removeprefix("convnextv2_")) == config
        assert variant_name(config) == name
    assert variant_name(EncoderConfig((1, 1, 1, 1), (8, 8, 8, 8))) is None
    with pytest.raises(ValueError, match="unknown model 'convnextv2_giga'; choose one of convnextv2_atto"):
        create_model("convnextv2_giga")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1, 1)}, "depths must be four positive integers"),
        ({"depths": (1, 1, 0, 1)}, "depths must be four positive integers"),
        ({"dims": (8, 8, 8, 8.5)}, "dims must be four positive integers"),
        ({"patch_size": 4}, "patch_size must be one of"),
        ({"patch_size": 24}, "patch_size must be one of"),
        ({"patch_size": 16.0}, "patch_size must be one of"),
        ({"in_chans": 0}, "in_chans must be at least 1"),
        ({"kernel_size": 6}, "kernel_size must be odd"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate"),
    ],
)
def test_wrong_encoders_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**{"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), **options})


@pytest.mark.parametrize(("patch", "stride"), [(32, 4), (16, 2), (8, 1)])
def test_a_patch_is_eight_cells_after_the_stem(patch, stride):
    assert EncoderConfig((1, 1, 1, 1), (8, 8, 8, 8), patch_size=patch).stem_stride == stride


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": (224, 220)}, "224 × 220 is not divisible by the patch size 32; the nearest that is: 224 × 224"),
        ({"img_size": (0, 32)}, "not divisible"),
        ({"img_size": (102400, 102400)}, "image size 102400 × 102400 is of more than 67,108,864 pixels"),
        ({"img_size": (32.0, 32.0)}, "not divisible"),
        ({"img_size": (1, 1)}, "the nearest that is: 32 × 32"),
        ({"decoder_depth": 0}, "decoder_depth and decoder_dim must be positive"),
        ({"decoder_dim": 0}, "decoder_depth and decoder_dim must be positive"),
        ({"grn_scope": "rows"}, "grn_scope must be one of"),
    ],
)
def test_wrong_autoencoders_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FCMAEConfig(encoder_config("atto"), **options)


def test_image_size_may_be_one_number():
    assert FCMAEConfig(encoder_config("atto"), 64).grid_size == (2, 2)
    assert FCMAEConfig(encoder_config("atto"), (64, 96)).grid_size == (2, 3)


def test_negative_classes_are_refused():
    with pytest.raises(ValueError, match="num_classes"):
        ClassifierConfig(encoder_config("atto"), -1)


@pytest.mark.parametrize(
    "config",
    [
        encoder_config("pico", in_chans=5, patch_size=16),
        FCMAEConfig(encoder_config("atto"), (64, 96), grn_scope="batch", norm_pix_loss=False),
        ClassifierConfig(encoder_config("atto"), 2, class_names=("daisy", "rose")),
    ],
    ids=lambda config: type(config).__name__,
)
def test_configurations_survive_json(config):
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "Transformer"}, "unknown configuration kind 'Transformer'"),
        ({"kind": None}, "unknown configuration kind None"),
        ({"heads": 3}, "has no field heads"),
        ({"patch_size": 7}, "patch_size"),
    ],
)
def test_foreign_configurations_are_refused(change, message):
    data = config_to_dict(encoder_config("atto")) | change
    with pytest.raises(ValueError, match=message):
        config_from_dict(data)
    del data["dims"]
    with pytest.raises(ValueError, match=r"incomplete EncoderConfig|unknown|no field"):
        config_from_dict(data)


def test_an_encoder_is_no_other_configuration():
    data = config_to_dict(ClassifierConfig(encoder_config("atto"), 2))
    with pytest.raises(ValueError, match="EncoderConfig has no field"):
        config_from_dict({**data, "encoder": data})


def test_scopes_of_grn_are_those_of_the_operations() -> None:
    """Said twice, for sparse_ops is not to be had without torch."""
    assert GRN_SCOPES == grid.GRN_SCOPES

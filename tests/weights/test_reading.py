from __future__ import annotations

import pytest
import torch
from weights_helpers import ENCODER, fcmae, randomise, same, sparse_official

from convnextv2 import FCMAEConfig, create_model
from convnextv2.models.config import ClassifierConfig
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError
from convnextv2.weights.reading import encoder_state_dict, read_weights, weights_config, write_layout


def test_published_encoder_and_classifier_layouts():
    classifier = randomise(create_model(ENCODER, num_classes=5))
    state = classifier.state_dict()
    assert weights_config(read_weights(state)) == ClassifierConfig(ENCODER, 5)
    encoder = {name: value for name, value in state.items() if name.split(".")[0] not in ("norm", "head")}
    assert weights_config(read_weights(encoder)) == ENCODER
    assert isinstance(weights_config(read_weights(fcmae().state_dict())), FCMAEConfig)
    assert same(encoder_state_dict(Checkpoint(state)), encoder)
    assert same(write_layout(read_weights(state), "official-dense"), state)


def test_half_precision_is_widened_without_loss():
    state = {name: value.half() for name, value in fcmae().state_dict().items()}
    weights = read_weights(state)
    assert weights.widened
    for name, value in weights.encoder.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[f"encoder.{name}"].float())


def test_every_missing_encoder_tensor_is_an_error():
    for state in (fcmae().encoder.state_dict(), sparse_official(fcmae())):
        for name in state:
            with pytest.raises(CheckpointError):
                read_weights({key: value for key, value in state.items() if key != name})


@pytest.mark.parametrize("name", ["norm.weight", "norm.bias", "head.weight", "head.bias"])
def test_half_a_head_is_an_error(name):
    state = create_model(ENCODER, num_classes=3).state_dict()
    with pytest.raises(CheckpointError, match="incomplete"):
        read_weights({key: value for key, value in state.items() if key != name})


def test_norm_without_head_is_allowed():
    state = create_model(ENCODER, num_classes=0).state_dict()
    assert weights_config(read_weights(state)) == ClassifierConfig(ENCODER, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_weights_are_refused(value):
    state = fcmae().state_dict()
    state["encoder.stages.1.0.pwconv1.bias"][3] = value
    with pytest.raises(CheckpointError, match=r"stages\.1\.0\.pwconv1\.bias holds NaN or infinity"):
        read_weights(state)


def test_other_networks_are_refused():
    import timm
    from timm.models.convnext import ConvNeXt

    with pytest.raises(CheckpointError, match=r"not the weights of a ConvNeXt V2.*bn1"):
        read_weights(timm.create_model("resnet10t").state_dict())
    first_version = ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4))
    with pytest.raises(CheckpointError, match="ConvNeXt V1"):
        read_weights(first_version.state_dict())
    state = {**fcmae().encoder.state_dict(), "extra.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match="extra"):
        read_weights(state)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stages.0.0.norm.weight", torch.ones(9), "shape"),
        ("stages.0.0.pwconv1.weight", torch.ones(32, 8, dtype=torch.int8), "quantised"),
        ("downsample_layers.0.0.weight", torch.ones(8, 3, 5, 5), "patch_size"),
        ("downsample_layers.0.0.weight", torch.ones(8, 48), "4 axes"),
        ("downsample_layers.0.0.weight", torch.ones(8, 3, 4, 2), "patch_size|shape"),
    ],
)
def test_wrong_shapes_and_types(name, value, message):
    with pytest.raises(CheckpointError, match=message):
        read_weights({**fcmae().encoder.state_dict(), name: value})


def test_incomplete_decoder():
    state = fcmae().state_dict()
    for gone in ("mask_token", "pred.bias", "decoder.1.grn.beta"):
        with pytest.raises(CheckpointError, match="incomplete"):
            read_weights({key: value for key, value in state.items() if key != gone})

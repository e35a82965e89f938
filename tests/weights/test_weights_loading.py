from __future__ import annotations

import re

import pytest
import torch
from weights_helpers import ENCODER, fcmae, randomise, same, sparse_official

from convnextv2 import ConvNeXtV2, EncoderConfig, create_fcmae, create_model
from convnextv2.models.config import ClassifierConfig
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from convnextv2.weights.loading import init_classifier, init_fcmae, load_model
from convnextv2.weights.reading import describe, encoder_state_dict, read_weights, write_layout


def test_official_sparse_file_loads_as_a_masked_autoencoder(tmp_path):
    model = fcmae()
    torch.save({"model": sparse_official(model), "epoch": 1}, tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth", backend="reference").double().eval()
    assert loaded.config.decoder_depth == 2
    assert loaded.config.decoder_dim == 16
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 0]])
    loaded_pred, pred = loaded(images, mask).pred, model(images, mask).pred
    torch.testing.assert_close(loaded_pred, pred, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["fcmae", "sparse-official", "official-dense", "timm", "transformers"])
def test_classifier_starts_from_any_layout(layout):
    source = fcmae()
    state = write_layout(read_weights(source.state_dict()), layout)
    model = create_model(ENCODER, num_classes=4).double()
    head = model.head.weight.clone()
    report = init_classifier(model, Checkpoint(state))
    assert all(torch.equal(model.state_dict()[name], v) for name, v in source.encoder.state_dict().items())
    assert torch.equal(model.head.weight, head)
    assert set(report.new) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert ("mask_token" in report.dropped) == (layout in ("fcmae", "sparse-official"))
    assert len(report.loaded) == len(source.encoder.state_dict())
    assert "freshly initialised: norm, head" in str(report)


def test_classifier_keeps_the_head_of_as_many_classes_only():
    source = randomise(create_model(ENCODER, num_classes=4))
    checkpoint = Checkpoint(source.state_dict())
    model = create_model(ENCODER, num_classes=4).double()
    report = init_classifier(model, checkpoint)
    assert same(dict(model.state_dict()), dict(source.state_dict()))
    assert report.new == report.dropped == ()
    other = create_model(ENCODER, num_classes=3).double()
    report = init_classifier(other, checkpoint)
    assert report.new == report.dropped == ("head.weight", "head.bias")
    assert torch.equal(other.norm.weight, source.norm.weight)


@pytest.mark.parametrize(
    ("there", "here", "kept", "said"),
    [
        (("a", "b", "c"), ("a", "b", "c"), True, ""),
        (("a", "b", "c"), ("a", "b", "d"), False, "the head there is of classes of other names"),
        (("a", "b", "c"), ("b", "a", "c"), False, "the head there is of the same classes in another order"),
        ((), ("a", "b", "c"), True, "the head is kept for its 3 outputs; the file does not name its classes"),
        (("a", "b", "c"), (), True, "the head is kept for its 3 outputs; the network does not name its classes"),
        ((), (), True, "the head is kept for its 3 outputs; the file does not name its classes"),
    ],
)
def test_a_head_is_kept_for_its_classes_not_for_their_number(there, here, kept, said):
    source = randomise(ConvNeXtV2(ClassifierConfig(ENCODER, 3, class_names=there)))
    model = ConvNeXtV2(ClassifierConfig(ENCODER, 3, class_names=here)).double()
    fresh = model.head.weight.clone()
    report = init_classifier(model, Checkpoint(source.state_dict(), source.config))
    assert torch.equal(model.head.weight, source.head.weight if kept else fresh)
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert report.new == report.dropped == (() if kept else ("head.weight", "head.bias"))
    assert str(report).endswith(said)
    assert bool(report.note) == bool(said)


def test_drop_path_is_no_matter_of_weights():
    model = create_model(EncoderConfig((1, 2, 1, 1), (8, 16, 16, 24), drop_path_rate=0.3), num_classes=4)
    assert init_classifier(model, Checkpoint(fcmae().state_dict())).loaded


@pytest.mark.parametrize(
    "config",
    [
        EncoderConfig((1, 1, 1, 1), (8, 16, 16, 24)),
        EncoderConfig((1, 2, 1, 1), (8, 16, 16, 32)),
        EncoderConfig((1, 1, 1, 1), (8, 16, 16, 24), in_chans=1, patch_size=16),
        EncoderConfig((1, 2, 1, 1), (8, 16, 16, 24), kernel_size=5),
    ],
)
def test_another_variant_is_refused_and_both_named(config):
    model = create_model(config, num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        init_classifier(model, Checkpoint(fcmae().state_dict()))
    assert describe(ENCODER) in str(caught.value)
    assert describe(config) in str(caught.value)
    assert "depths 1-2-1-1, widths 8-16-16-24, 3 channels, patch size 32" in str(caught.value)
    assert same(before, dict(model.state_dict()))
    autoencoder = create_fcmae(config, img_size=64, decoder_dim=16, backend="reference")
    before = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    with pytest.raises(CheckpointError, match=re.escape(f"but the network is {describe(config)}")):
        init_fcmae(autoencoder, Checkpoint(fcmae().state_dict()))
    assert same(before, dict(autoencoder.state_dict()))


@pytest.mark.parametrize("layout", ["fcmae", "sparse-official", "official-dense", "timm", "transformers"])
@pytest.mark.parametrize("width", [16, 24])
def test_autoencoder_starts_from_any_layout(layout, width):
    source = fcmae()
    state = write_layout(read_weights(source.state_dict()), layout)
    model = create_fcmae(ENCODER, img_size=64, decoder_dim=width, decoder_depth=2, backend="reference").double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said = init_fcmae(model, Checkpoint(state))
    whole = width == 16 and layout in ("fcmae", "sparse-official")
    for name, value in model.state_dict().items():
        origin = source.state_dict() if whole or name.startswith("encoder.") else before
        assert torch.equal(value, origin[name]), name
    assert ("nothing is freshly" if whole else "the decoder is freshly") in said


def test_errors_name_the_file(tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"conv1.weight": torch.ones(1)}, None)
    for function in (encoder_state_dict, load_model, lambda path: init_classifier(create_model(ENCODER), path)):
        with pytest.raises(CheckpointError, match=r"a\.pth: not the weights"):
            function(tmp_path / "a.pth")


def test_a_classifier_runs_on_the_backend_that_is_named(tmp_path):
    model = create_model(ENCODER, num_classes=2)
    save_checkpoint(tmp_path / "a.safetensors", model, model.config, {})
    assert load_model(tmp_path / "a.safetensors", backend="torch").backend == "torch"
    with pytest.raises(ValueError, match="must be one of auto, torch, cpu, got 'reference'"):
        load_model(tmp_path / "a.safetensors", backend="reference")

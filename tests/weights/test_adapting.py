"""Weights for other channels and another patch size: what the network answers stays what it was, as far as it can."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models import adapt_input_conv
from weights_helpers import ENCODER, fcmae, randomise, same

from convnextv2 import Encoder, EncoderConfig, create_fcmae, create_model
from convnextv2.weights.adapting import mapped_channels, other_channels, other_stride, parse_bands, read_for
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError
from convnextv2.weights.loading import init_classifier, init_fcmae
from convnextv2.weights.reading import read_weights

STEM = "downsample_layers.0.0.weight"


def kernel(channels: int, side: int = 4) -> torch.Tensor:
    return torch.randn(5, channels, side, side, dtype=torch.float64)


def adapted(source: Encoder, **changes: object) -> Encoder:
    """The encoder that ``source`` becomes."""
    config = replace(source.encoder_config, **changes)
    encoder = Encoder(config).double().eval()
    weights, _ = read_for(config, Checkpoint(source.state_dict()))
    encoder.load_state_dict(weights.encoder)
    return encoder


@pytest.mark.parametrize(("there", "here"), [(32, 16), (32, 8), (16, 8)])
@torch.no_grad()
def test_a_smaller_patch_sees_an_image_as_the_larger_one_sees_it_enlarged(there, here):
    source = randomise(Encoder(replace(ENCODER, patch_size=there)))
    images = torch.randn(2, 3, 2 * here, 3 * here, dtype=torch.float64)
    enlarged = images.repeat_interleave(there // here, 2).repeat_interleave(there // here, 3)
    torch.testing.assert_close(adapted(source, patch_size=here)(images), source(enlarged), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("there", "here"), [(16, 32), (8, 32), (8, 16)])
@torch.no_grad()
def test_a_larger_patch_sees_an_image_as_the_smaller_one_sees_it_reduced(there, here):
    source = randomise(Encoder(replace(ENCODER, patch_size=there)))
    images = torch.randn(2, 3, 2 * here, 3 * here, dtype=torch.float64)
    reduced = torch.nn.functional.avg_pool2d(images, here // there)
    other = adapted(source, patch_size=here)
    torch.testing.assert_close(other(images), source(reduced), rtol=1e-9, atol=1e-9)
    back = adapted(other, patch_size=there)
    torch.testing.assert_close(back.state_dict()[STEM], source.state_dict()[STEM], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("there", "here"), [(4, 2), (4, 1), (2, 4), (1, 4)])
def test_the_kernel_is_the_pseudo_inverse_resize_of_flexivit(there, here):
    """``pinv(Bᵀ) w``, with the matrix ``B`` of a box filter that resizes images of ``there²`` pixels to ``here²``."""
    one = np.zeros((here, there))
    for row, column in np.ndindex(one.shape):
        lower, upper = max(row / here, column / there), min((row + 1) / here, (column + 1) / there)
        one[row, column] = max(upper - lower, 0) * here
    matrix = np.kron(one, one)
    given = kernel(3, there)
    expected = given.flatten(2).numpy() @ np.linalg.pinv(matrix)
    assert np.allclose(other_stride(given, here).flatten(2).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("here", [1, 2, 4, 6, 12])
def test_from_three_channels_as_timm(here):
    given = kernel(3)
    torch.testing.assert_close(other_channels(given, here), adapt_input_conv(here, given), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("there", "here"),
    [(1, 3), (1, 4), (1, 12), (3, 1), (3, 12), (4, 1), (4, 3), (4, 12), (12, 1), (12, 3), (12, 4), (12, 200), (5, 7)],
)
def test_the_answer_to_an_image_alike_in_all_channels_is_kept(there, here):
    given = kernel(there)
    found = other_channels(given, here)
    assert found.shape == (5, here, 4, 4)
    torch.testing.assert_close(found.sum(1), given.sum(1), rtol=1e-5, atol=1e-5)


def test_left_out_bands_are_taken_for_the_mean_of_the_others():
    given = kernel(4)
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    whole = torch.cat([pixels, pixels.mean(1, keepdim=True)], 1)
    answers = torch.einsum("dcij,bcij->bd", given, whole)
    found = torch.einsum("dcij,bcij->bd", other_channels(given, 3), pixels)
    torch.testing.assert_close(found, answers)


def test_bands_that_are_known_take_their_own_weights_and_others_start_at_zero():
    given = kernel(3)
    found = mapped_channels(given, [None, 2, 1, 0, None])
    assert torch.equal(found[:, [3, 2, 1]], given)
    assert not found[:, [0, 4]].any()
    half = mapped_channels(given, [2, None])
    torch.testing.assert_close(half[:, 0], given.sum(1))


def test_init_bands_as_text():
    assert parse_bands(None, 3, 1) is None
    assert parse_bands(" 0, 3,2,1", 3, 4) == [None, 2, 1, 0]
    for text in ("0,0,0,0", "1,2,3", "1,1,2,3", "4,1,2,3", "a,b", "1,,2,3", "-1,1,2,3", "1 2 3 0", "9" * 40, "٣,1,2,0"):
        with pytest.raises(ValueError, match="`init_bands` must be") as caught:
            parse_bands(text, 3, 4)
        assert len(str(caught.value)) < 300


def test_a_classifier_starts_with_a_stem_for_other_images_and_says_so():
    source = randomise(create_model(ENCODER, num_classes=4))
    config = replace(ENCODER, in_chans=1, patch_size=8)
    model = create_model(config, num_classes=4).double()
    report = init_classifier(model, Checkpoint(source.state_dict()))
    assert "the stem is adapted, patch size 32 to 8 and 3 to 1 channels" in str(report)
    expected = source.state_dict() | {STEM: source.state_dict()[STEM].sum((1, 2, 3), keepdim=True)}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert report.new == report.dropped == ()
    same_channels = create_model(ENCODER, num_classes=4).double()
    report = init_classifier(same_channels, Checkpoint(source.state_dict()), bands="3,2,1")
    assert torch.equal(same_channels.state_dict()[STEM], source.state_dict()[STEM].flip(1))
    assert "3 to 3 channels as `init_bands` says" in report.note


def test_pretraining_goes_on_with_a_decoder_whose_last_layer_is_new():
    source = fcmae()
    config = replace(ENCODER, in_chans=12)
    model = create_fcmae(config, img_size=64, decoder_dim=16, decoder_depth=2, backend="reference").double()
    fresh = model.pred.weight.clone()
    said = init_fcmae(model, Checkpoint(source.state_dict()))
    assert "the decoder's last layer is freshly initialised; the stem is adapted, 3 to 12 channels" in said
    assert torch.equal(model.pred.weight, fresh)
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("pred.")}
    for name in state.keys() - {f"encoder.{STEM}"}:
        assert torch.equal(model.state_dict()[name], state[name]), name
    assert torch.equal(model.state_dict()[f"encoder.{STEM}"], other_channels(source.encoder.state_dict()[STEM], 12))


def test_a_last_layer_that_fits_by_chance_is_not_taken():
    """1 channel at patch size 16 has as many pixels as 4 at patch size 8: the same shape, and other pixels."""
    source = fcmae(replace(ENCODER, patch_size=16, in_chans=1))
    model = create_fcmae(
        replace(ENCODER, patch_size=8, in_chans=4), img_size=32, decoder_dim=16, decoder_depth=2, backend="reference"
    ).double()
    assert model.pred.weight.shape == source.pred.weight.shape
    fresh = model.pred.weight.clone()
    init_fcmae(model, Checkpoint(source.state_dict()))
    assert torch.equal(model.pred.weight, fresh)
    assert torch.equal(model.proj.weight, source.proj.weight)


def test_a_deeper_decoder_is_new_altogether():
    source = fcmae()
    model = create_fcmae(ENCODER, img_size=64, decoder_dim=16, decoder_depth=3, backend="reference").double()
    before = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("encoder.")}
    assert "; the decoder is freshly initialised" in init_fcmae(model, Checkpoint(source.state_dict()))
    assert same(before, {name: value for name, value in model.state_dict().items() if not name.startswith("encoder.")})


def test_what_makes_no_sense_is_refused():
    source = Checkpoint(fcmae().state_dict())
    for changes in ({"kernel_size": 5}, {"depths": (1, 2, 1, 2)}, {"dims": (8, 16, 16, 32)}):
        config = EncoderConfig(**{**vars(ENCODER), "in_chans": 1, "patch_size": 8, **changes})
        with pytest.raises(CheckpointError, match="choose the model that the checkpoint is of"):
            read_for(config, source)
    config = replace(ENCODER, drop_path_rate=0.3)
    weights, said = read_for(config, source)
    assert said == ""
    assert same(weights.encoder, read_weights(source.state_dict).encoder)

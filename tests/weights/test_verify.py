from __future__ import annotations

import pytest
import torch
from weights_helpers import fcmae, sparse_official

from convnextv2 import EncoderConfig
from convnextv2.weights import verify
from convnextv2.weights.checkpoint import CheckpointError
from convnextv2.weights.evaluators import official_sparse_features
from convnextv2.weights.layouts import sparse_official as converter
from convnextv2.weights.reading import read_weights, write_layout
from convnextv2.weights.verify import verify_conversion
from sparse_ops import ActiveSet


def test_the_independent_evaluator_is_the_sparse_network():
    model = fcmae()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    visible = torch.tensor([[[1, 0, 1], [0, 1, 1]], [[0, 0, 0], [1, 0, 0]]], dtype=torch.bool)
    features = official_sparse_features(sparse_official(model), images, visible)
    with torch.no_grad():
        expected, _ = model.encode(images, ActiveSet.from_mask(~visible))
    assert features.shape == (5, 24)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize(("patch_size", "in_chans", "kernel_size"), [(32, 3, 7), (16, 1, 5), (8, 5, 3)])
def test_verification_passes_for_right_conversions(patch_size, in_chans, kernel_size):
    config = EncoderConfig((1, 1, 2, 1), (4, 6, 5, 8), in_chans, patch_size, kernel_size)
    model = fcmae(config)
    official = sparse_official(model)
    assert read_weights(official).config == config
    dense = write_layout(read_weights(official), "official-dense")
    for source, written in ((official, dense), (model.state_dict(), dense), (dense, official)):
        verification = verify_conversion(source, written)
        assert verification.passed
        assert verification.largest < 1e-13
        assert f"{verification.largest:.1e}" in str(verification)


def test_verification_catches_the_missing_axis_swap(monkeypatch):
    official = sparse_official(fcmae())

    def without_swap(kernel):
        side = round(kernel.shape[0] ** 0.5)
        return kernel.permute(tuple(reversed(range(kernel.dim())))).unflatten(-1, (side, side)).contiguous()

    monkeypatch.setattr(converter, "taps_to_map", without_swap)
    verification = verify_conversion(official, write_layout(read_weights(official), "official-dense"))
    assert not verification.passed
    assert verification.masked > 1e-2
    assert verification.unmasked > 1e-2


@pytest.mark.parametrize("name", ["stages.2.0.dwconv.weight", "downsample_layers.2.1.weight"])
@pytest.mark.parametrize("change", [lambda w: w.transpose(-1, -2), lambda w: w.flip(-1), lambda w: w * (1 + 1e-8)])
def test_verification_catches_a_single_wrong_kernel(name, change):
    official = sparse_official(fcmae())
    dense = write_layout(read_weights(official), "official-dense")
    dense[name] = change(dense[name]).contiguous()
    verification = verify_conversion(official, dense)
    assert not verification.passed
    assert verification.largest > verify.TOLERANCE


def test_verification_of_nan_or_another_shape_does_not_pass():
    assert not verify.Verification(float("nan"), 0.0).passed
    other = fcmae(EncoderConfig((1, 1, 1, 1), (8, 16, 16, 24)))
    assert not verify_conversion(fcmae().state_dict(), other.encoder.state_dict()).passed


def test_timm_has_no_patch_size_16():
    config = EncoderConfig((1, 1, 1, 1), (4, 4, 4, 4), patch_size=16)
    state = fcmae(config).state_dict()
    with pytest.raises(CheckpointError, match="stride 2"):
        verify_conversion(state, write_layout(read_weights(state), "timm"))

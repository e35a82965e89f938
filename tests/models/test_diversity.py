from __future__ import annotations

import pytest
import torch

from convnextv2.models.config import EncoderConfig
from convnextv2.models.diversity import feature_diversity
from convnextv2.models.encoder import Encoder


def encoder(rate: float) -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig((2, 2, 2, 2), (8, 16, 16, 24), patch_size=16, drop_path_rate=rate))


def test_drop_path_does_not_make_the_diversity_noisy() -> None:
    images = torch.randn(4, 3, 32, 32)
    expected = feature_diversity(encoder(0.0).eval(), images)
    noisy = encoder(0.9).train()
    state = torch.get_rng_state()
    assert [feature_diversity(noisy, images) for _ in range(3)] == [expected] * 3
    assert torch.equal(torch.get_rng_state(), state)


def test_every_module_gets_its_own_mode_back() -> None:
    measured = encoder(0.5).train()
    measured.stages[1].eval()
    modes = {name: module.training for name, module in measured.named_modules()}
    assert set(modes.values()) == {True, False}
    feature_diversity(measured, torch.randn(2, 3, 32, 32))
    assert {name: module.training for name, module in measured.named_modules()} == modes
    with pytest.raises(ValueError, match="smaller than the patch size"):
        feature_diversity(measured, torch.randn(2, 3, 31, 7))
    assert {name: module.training for name, module in measured.named_modules()} == modes

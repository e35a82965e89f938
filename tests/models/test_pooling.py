"""Classifiers that pool more than the mean: their head, their files, and where these cannot go."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import randomise, tiny_config
from safetensors.torch import save_file

from convnextv2 import ClassifierConfig, ConvNeXtV2, create_model
from convnextv2.models.config import config_from_dict, config_to_dict
from convnextv2.models.pooling import maps_of, pool
from convnextv2.weights.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from convnextv2.weights.loaders import load_timm, official_loading
from convnextv2.weights.loading import init_classifier, load_model
from convnextv2.weights.reading import read_weights, weights_config, write_layout
from sparse_ops.grid import DenseGrid

CONFIG = ClassifierConfig(tiny_config(), 5, pooling="mean_std")
WIDTHS = {"mean_std": 48, "stages": 2 * (8 + 16 + 16 + 24)}


@pytest.fixture(params=WIDTHS)
def model(request: pytest.FixtureRequest) -> ConvNeXtV2:
    torch.manual_seed(0)
    model = ConvNeXtV2(dataclasses.replace(CONFIG, pooling=request.param)).eval()
    randomise(model)
    return model


def test_mean_and_standard_deviation() -> None:
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = torch.cat([features.mean((2, 3)), features.std((2, 3), correction=0)], 1)
    torch.testing.assert_close(pool(features, "mean_std").double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(pool(features, "mean"), features.mean((2, 3)))


def test_cells_that_are_alike_have_a_gradient() -> None:
    features = torch.ones(1, 2, 3, 3, requires_grad=True)
    pool(features, "mean_std").sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()
    assert pool(torch.ones(1, 2, 1, 1), "mean_std").tolist() == [[1, 1, pytest.approx(1e-3), pytest.approx(1e-3)]]
    assert pool(features.bfloat16(), "mean_std").dtype == torch.bfloat16


def test_all_stages_are_pooled_alike_in_order() -> None:
    maps = [torch.randn(2, channels, side, side) for channels, side in ((3, 8), (5, 4), (7, 1))]
    expected = torch.cat([pool(one, "mean_std") for one in maps], 1)
    assert torch.equal(pool(maps, "stages"), expected)
    with pytest.raises(ValueError, match="takes the maps of all stages, not one"):
        pool(maps[0], "stages")
    with pytest.raises(ValueError, match="Identity has no maps but the last one"):
        maps_of(torch.nn.Identity(), torch.randn(1, 3, 32, 32), "stages")


def test_the_head_is_as_wide_as_what_is_pooled(model: ConvNeXtV2) -> None:
    images, pooling = torch.randn(2, 3, 64, 96), model.config.pooling
    width = WIDTHS[pooling]
    assert model.norm.weight.shape == (width,)
    assert model.head.weight.shape == (5, width)
    maps = [features for features, _ in model.forward_stages(images, DenseGrid(2))]
    assert [tuple(one.shape[1:]) for one in maps] == [(8, 16, 24), (16, 8, 12), (16, 4, 6), (24, 2, 3)]
    pooled = pool(maps if pooling == "stages" else model.forward_features(images), pooling)
    normed = torch.nn.functional.layer_norm(pooled, (width,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(model(images), normed @ model.head.weight.t() + model.head.bias, rtol=1e-4, atol=1e-4)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)


def test_every_stage_has_a_gradient_of_its_own() -> None:
    model = ConvNeXtV2(dataclasses.replace(CONFIG, pooling="stages"))
    last = model.stages[3].register_forward_hook(lambda module, given, found: found.detach())
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    last.remove()
    assert all(model.stages[number][0].pwconv1.weight.grad.abs().sum() > 0 for number in range(3))


def test_a_file_brings_it_back(model: ConvNeXtV2, tmp_path: Path) -> None:
    images, config = torch.randn(2, 3, 64, 64), model.config
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    save_checkpoint(tmp_path / "ours.safetensors", model, config, {})
    for name in ("ours", "bare"):
        loaded = load_model(tmp_path / f"{name}.safetensors")
        assert isinstance(loaded, ConvNeXtV2)
        assert loaded.config.pooling == config.pooling
        assert torch.equal(loaded.eval()(images), model(images))
    other = create_model(tiny_config(), num_classes=5)
    report = init_classifier(other, load_checkpoint(tmp_path / "ours.safetensors"))
    assert sorted(report.dropped) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert torch.equal(other.stages[0][0].pwconv1.weight, model.stages[0][0].pwconv1.weight)


def test_a_configuration_of_the_other_pooling_is_refused(model: ConvNeXtV2, tmp_path: Path) -> None:
    path = tmp_path / "wrong.safetensors"
    save_checkpoint(path, model, dataclasses.replace(CONFIG, pooling="mean"), {})
    with pytest.raises(CheckpointError, match=f"pooling mean, not {model.config.pooling}"):
        load_model(path)


def test_files_of_the_published_pooling_are_as_before() -> None:
    usual = dataclasses.replace(CONFIG, pooling="mean")
    assert "pooling" not in config_to_dict(usual)
    assert config_to_dict(CONFIG)["pooling"] == "mean_std"
    assert config_from_dict(config_to_dict(usual)) == usual
    assert config_from_dict(config_to_dict(CONFIG)) == CONFIG
    values: dict[str, Any] = {**config_to_dict(CONFIG), "pooling": "max"}
    with pytest.raises(ValueError, match="pooling must be one of mean, mean_std, stages, got 'max'"):
        config_from_dict(values)


def test_other_projects_have_no_such_head(model: ConvNeXtV2) -> None:
    weights = read_weights(model.state_dict())
    assert weights_config(read_weights(model.state_dict())) == model.config
    with pytest.raises(CheckpointError, match="does not take the weights"):
        load_timm(write_layout(weights, "timm"), weights.config)
    lines = official_loading(write_layout(weights, "official-dense"), weights.config, "x.safetensors")
    assert lines[-1] == "the official networks do not take it: they pool by the mean alone"

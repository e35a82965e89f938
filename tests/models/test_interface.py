"""What timm's tools ask of a classifier, answered as timm's own model answers."""

from __future__ import annotations

import pytest
import timm
import torch
from model_helpers import tiny_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

from convnextv2 import ClassifierConfig, ConvNeXtV2, create_model
from convnextv2.weights import load_model, save_checkpoint
from convnextv2.weights.layouts import get_layout


@pytest.fixture(scope="module")
def pair() -> tuple[ConvNeXtV2, nn.Module]:
    """Ours, and timm's of the same shape."""
    config = tiny_config(depths=(1, 2, 3, 2))
    theirs = timm.create_model("convnextv2_tiny", depths=config.depths, dims=config.dims, num_classes=5)
    return create_model(config, num_classes=5), theirs


@pytest.mark.parametrize("coarse", [False, True])
def test_layers_are_grouped_as_timm_groups_its_own(pair: tuple[ConvNeXtV2, nn.Module], coarse: bool) -> None:
    ours, theirs = (group_parameters(model, model.group_matcher(coarse), reverse=True) for model in pair)
    assert {get_layout("timm").name_of(name): layer for name, layer in ours.items()} == theirs
    assert len(set(ours.values())) == (6 if coarse else 10)


def test_timms_optimizer_gives_every_parameter_the_rate_and_decay_of_timms_own(
    pair: tuple[ConvNeXtV2, nn.Module],
) -> None:
    found = []
    for model in pair:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = create_optimizer_v2(model, "adamw", weight_decay=0.05, layer_decay=0.5).param_groups
        found.append({names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]})
    ours, theirs = {get_layout("timm").name_of(name): value for name, value in found[0].items()}, found[1]
    assert ours == theirs
    assert pair[0].no_weight_decay() == {name for name, _ in pair[0].named_parameters() if "grn" in name}
    assert ours["stages.0.blocks.0.mlp.grn.weight"][1] == 0


def test_a_new_head_is_said_by_the_configuration_too(tmp_path) -> None:
    config = ClassifierConfig(tiny_config(), 3, class_names=("a", "b", "c"))
    model = ConvNeXtV2(config).double()
    assert model.get_classifier() is model.head
    assert (model.num_classes, model.num_features) == (3, 24)
    model.reset_classifier(7, "avg")
    assert model.get_classifier().weight.shape == (7, 24)
    assert model.get_classifier().weight.dtype == torch.float64
    assert (model.num_classes, model.config.num_classes, model.config.class_names) == (7, 7, ())
    assert model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).shape == (2, 7)
    save_checkpoint(tmp_path / "a.safetensors", model, model.config)
    assert load_model(tmp_path / "a.safetensors").config.num_classes == 7
    model.reset_classifier(0, global_pool=None)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).shape == (2, 24)
    for wrong in ((4, "max"), (4, ""), (-1, None), ("4", None)):
        with pytest.raises(ValueError, match=r"global_pool must be None or 'avg'|num_classes must be"):
            model.reset_classifier(*wrong)
    assert model.num_classes == 0

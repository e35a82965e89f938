from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import make_images, pretrain_options, weights

from convnextv2 import ConvNeXtV2, create_fcmae
from convnextv2.models.config import ClassifierConfig, EncoderConfig
from convnextv2.training.optim import (
    create_optimizer,
    create_schedule,
    layer_number,
    num_layers,
    parameter_groups,
    scaled_lr,
)
from convnextv2.training.pretraining import pretrain

TINY = EncoderConfig((1, 2, 4, 1), (8, 8, 8, 8))


def classifier() -> ConvNeXtV2:
    return ConvNeXtV2(ClassifierConfig(TINY, 3))


def shrunk(model: torch.nn.Module, **options: bool) -> set[str]:
    """Kinds of parameters that an update without gradients makes smaller."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    create_optimizer(parameter_groups(model, 0.5, **options), 0.1, (0.9, 0.95)).step()
    values = {name: set(parameter.flatten().tolist()) for name, parameter in model.named_parameters()}
    assert all(value in ({1.0}, {0.949999988079071}) for value in values.values())  # 1 - 0.1 · 0.5
    return {name for name, value in values.items() if value != {1.0}}


def test_biases_norms_grn_and_mask_token_are_not_decayed() -> None:
    decayed = shrunk(create_fcmae(TINY, img_size=64))
    block = {"dwconv.weight", "pwconv1.weight", "pwconv2.weight"}
    assert {name.removeprefix("encoder.stages.0.0.") for name in decayed if "stages.0.0." in name} == block
    assert {name.removeprefix("decoder.0.") for name in decayed if name.startswith("decoder.0.")} == block
    rest = {name for name in decayed if ".stages." not in name and not name.startswith("decoder.")}
    assert rest == {"proj.weight", "pred.weight", "encoder.downsample_layers.0.0.weight"} | {
        f"encoder.downsample_layers.{stage}.1.weight" for stage in (1, 2, 3)
    }


def test_official_weight_decay_reaches_grn_and_mask_token() -> None:
    gained = shrunk(create_fcmae(TINY, img_size=64), official_weight_decay=True) - shrunk(
        create_fcmae(TINY, img_size=64)
    )
    assert len(gained) == 2 * (sum(TINY.depths) + 1) + 1
    assert {"mask_token", "decoder.0.grn.beta", "encoder.stages.2.3.grn.gamma"} <= gained


@pytest.mark.parametrize(
    ("name", "single", "group"),
    [
        ("downsample_layers.0.0.weight", 1, 0),
        ("stages.0.2.dwconv.weight", 3, 1),
        ("downsample_layers.1.0.bias", 4, 2),
        ("stages.1.0.norm.weight", 4, 2),
        ("downsample_layers.2.1.weight", 7, 3),
        ("stages.2.0.grn.gamma", 7, 3),
        ("stages.2.2.grn.gamma", 9, 3),
        ("stages.2.3.grn.gamma", 10, 4),
        ("stages.2.26.pwconv1.weight", 33, 11),
        ("downsample_layers.3.1.weight", 34, 12),
        ("stages.3.2.pwconv2.bias", 36, 12),
        ("norm.weight", 37, 13),
        ("head.bias", 37, 13),
    ],
)
def test_layer_numbers_are_the_official_ones_for_base(name: str, single: int, group: int) -> None:
    depths = (3, 3, 27, 3)
    assert layer_number(name, depths, "single") == single
    assert layer_number(name, depths, "group") == group


def test_group_numbers_follow_the_depths() -> None:
    assert num_layers((3, 3, 27, 3), "group") == 12
    assert num_layers((2, 2, 8, 2), "group") == 6
    assert layer_number("stages.2.7.norm.weight", (2, 2, 8, 2), "group") == 5
    assert layer_number("stages.3.0.norm.weight", (2, 2, 8, 2), "group") == 6


def test_layer_decay_scales_the_learning_rate_of_timms_schedule() -> None:
    model = classifier()
    groups = parameter_groups(model, 0.05, depths=TINY.depths, layer_decay=0.5)
    optimizer = create_optimizer(groups, 1.0, (0.9, 0.999))
    create_schedule(optimizer, 10, 2, 0.5).step_update(5)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert rate[id(named["head.weight"])] == 1.0
    assert rate[id(named["stages.3.0.dwconv.weight"])] == 0.5
    assert rate[id(named["stages.0.0.dwconv.weight"])] == 0.5**8
    assert rate[id(named["downsample_layers.0.0.weight"])] == 0.5**8


def test_frozen_parameters_stay_out_and_bad_decay_is_refused() -> None:
    model = classifier()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name == "head.weight"
    (group,) = parameter_groups(model, 0.05)
    assert [p is model.head.weight for p in group["params"]] == [True]
    with pytest.raises(ValueError, match="layer_decay must be in"):
        parameter_groups(model, 0.05, layer_decay=0.0)
    model.head.weight.requires_grad = False
    with pytest.raises(ValueError, match="no parameter"):
        parameter_groups(model, 0.05)
    with pytest.raises(ValueError, match="layer_decay_type"):
        layer_number("head.bias", (1, 1, 1, 1), "blocks")  # type: ignore[arg-type]


def test_schedule_rises_linearly_and_falls_as_half_a_cosine() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = create_optimizer([{"params": [parameter]}], 2.0, (0.9, 0.95))
    schedule = create_schedule(optimizer, updates_per_epoch=10, epochs=10, warmup_epochs=2, min_lr=0.5)
    rates = []
    for step in (0, 10, 20, 60, 100):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.25, 0.5])


def test_long_warmup_is_cut_to_half_the_run() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = create_optimizer([{"params": [parameter]}], 2.0, (0.9, 0.95))
    schedule = create_schedule(optimizer, updates_per_epoch=4, epochs=2, warmup_epochs=40)
    schedule.step_update(4)
    assert optimizer.param_groups[0]["lr"] == 2.0


def test_rate_scales_with_the_batch_and_lr_overrides() -> None:
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert scaled_lr(1.5e-4, 4096, 0.1) == 0.1


def test_unknown_optimizer_is_named() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'adamx'"):
        create_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], 1.0, (0.9, 0.95), "adamx")


def test_fused_kernels_are_asked_for_where_there_are_any():
    def options(name: str, fused: bool) -> object:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
        return create_optimizer(groups, 1.0, (0.9, 0.95), name, fused)

    assert options("adamw", True).param_groups[0]["fused"] is True
    assert not options("adamw", False).param_groups[0]["fused"]
    assert "fused" not in options("lion", True).param_groups[0]
    resumed = options("adamw", True)
    resumed.load_state_dict(options("adamw", False).state_dict())
    assert not resumed.param_groups[0]["fused"]  # a run goes on as it began


@pytest.mark.parametrize("name", ["nmuon", "adamuon", "lion", "lamb"])
def test_another_optimizer_trains_and_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    data = make_images(tmp_path / "images")
    given: dict[str, Any] = {"optimizer": name, "lr": 2e-3, "schedule": "constant", "warmup_epochs": 0}
    whole = pretrain(pretrain_options(data, tmp_path / "whole", epochs=3, **given))
    pretrain(pretrain_options(data, tmp_path / "parts", epochs=1, **given))
    ended = pretrain(pretrain_options(data, tmp_path / "parts", epochs=3, resume=True, **given))
    assert whole.metrics[-1]["loss"] < whole.metrics[0]["loss"]
    for key, value in weights(whole.folder).items():
        assert torch.equal(value, weights(ended.folder)[key]), key

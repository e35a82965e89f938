"""Networks to compare with differ in what they are said to, and looking at features changes no weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convnextv2.data.build import build_finetune_datasets
from convnextv2.models.config import EncoderConfig
from convnextv2.models.fcmae import FCMAE, create_fcmae
from convnextv2.training import (
    FinetuneOptions,
    FinetuneResult,
    PretrainOptions,
    PretrainResult,
    finetune,
    pretrain,
    run_task,
)
from sparse_ops.active_set import ActiveSet
from studies.frozen import accuracy, extract
from studies.images import spec_of
from studies.variants import LeakingFCMAE, StudyClassifier, StudyPretrain

SMALL: dict[str, Any] = {
    "data": spec_of("digits", {"images": 60}), "depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8), "img_size": 16,
    "patch_size": 8, "in_chans": 1, "batch_size": 16, "workers": 0, "epochs": 2, "device": "cpu",
}  # fmt: skip


def networks(**options: Any) -> tuple[FCMAE, LeakingFCMAE]:
    """A sparse one and a leaking one of the same weights, which are large enough to see differences."""
    plain = create_fcmae(EncoderConfig((1, 1, 1, 1), (4, 8, 8, 8), patch_size=8), img_size=32, decoder_dim=8, **options)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    leaking = LeakingFCMAE(plain.config)
    leaking.load_state_dict(plain.state_dict())
    return plain, leaking


@pytest.mark.parametrize("grn_scope", ["image", "batch"])
def test_without_a_mask_leaking_and_sparse_are_the_same(grn_scope: str) -> None:
    plain, leaking = networks(grn_scope=grn_scope)
    images = torch.randn(2, 3, 32, 32)
    visible = ActiveSet.from_mask(torch.zeros(2, 16), (4, 4))
    expected, found = (network.encode(images, visible)[0] for network in (plain, leaking))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_with_a_mask_visible_content_leaks_but_masked_content_does_not() -> None:
    plain, leaking = networks()
    images, mask = torch.randn(1, 3, 32, 32), torch.ones(1, 4, 4)
    mask[0, 0, 0] = mask[0, 0, 3] = 0  # two patches, further from each other than a kernel of the first stages reaches
    visible = ActiveSet.from_mask(mask.flatten(1), (4, 4))
    expected, found = (network.encode(images, visible)[0] for network in (plain, leaking))
    assert found.shape == expected.shape == (2, 8)
    assert (found - expected).abs().max() > 0.01
    other = images.clone()
    other[:, :, 8:] = 7.0
    torch.testing.assert_close(leaking.encode(other, visible)[0], found)
    leaking(images, mask).loss.backward()
    assert leaking.encoder.get_parameter("stages.0.0.dwconv.weight").grad.abs().sum() > 0  # type: ignore[union-attr]


def test_variants_begin_with_the_same_weights(tmp_path: Path) -> None:
    states = []
    for variant in (None, "leaking", "no-grn"):
        task = StudyPretrain(PretrainOptions(output=tmp_path, decoder_dim=8, mask_ratio=0.5, **SMALL))
        task.variant = variant
        torch.manual_seed(1)
        states.append(task.model().state_dict())
    assert all(torch.equal(state[name], value) for state in states for name, value in states[0].items())


def test_probes_change_no_weight(tmp_path: Path) -> None:
    plain = pretrain(PretrainOptions(output=tmp_path / "plain", decoder_dim=8, mask_ratio=0.5, **SMALL))
    task = StudyPretrain(PretrainOptions(output=tmp_path / "probed", decoder_dim=8, mask_ratio=0.5, **SMALL))
    task.probes = 1
    probed = run_task(task, PretrainResult)
    assert [row["loss"] for row in probed.metrics] == [row["loss"] for row in plain.metrics]
    assert ["knn" in row for row in probed.metrics] == [False, True]
    last, best, expected = (
        load_file(tmp_path / run / "checkpoints" / f"{name}.safetensors")
        for run, name in (("probed", "last"), ("probed", "best"), ("plain", "last"))
    )
    assert all(torch.equal(last[name], value) and torch.equal(best[name], value) for name, value in expected.items())


def test_without_grn_its_parameters_stay_zero(tmp_path: Path) -> None:
    task = StudyPretrain(PretrainOptions(output=tmp_path / "first", decoder_dim=8, mask_ratio=0.5, **SMALL))
    task.variant = "no-grn"
    run_task(task, PretrainResult)
    options = FinetuneOptions(output=tmp_path / "tuned", init=tmp_path / "first", **SMALL)
    tuning = StudyClassifier(options)
    tuning.variant = "no-grn"
    tuned = run_task(tuning, FinetuneResult)
    usual = pretrain(PretrainOptions(output=tmp_path / "usual", decoder_dim=8, mask_ratio=0.5, **SMALL))
    sums = [
        sum(float(value.detach().abs().sum()) for name, value in model.named_parameters() if ".grn." in name)
        for model in (load_model(tmp_path / "first"), tuned.model, usual.model)
    ]
    assert sums[0] == sums[1] == 0 < sums[2]


@pytest.mark.parametrize(("patience", "measured"), [(None, [False, True]), (5, [True, True])])
def test_fine_tuning_is_measured_at_its_end_and_comes_to_the_same(
    patience: int | None, measured: list[bool], tmp_path: Path
) -> None:
    usual = finetune(FinetuneOptions(output=tmp_path / "usual", patience=patience, **SMALL))
    found = run_task(
        StudyClassifier(FinetuneOptions(output=tmp_path / "found", patience=patience, **SMALL)), FinetuneResult
    )
    assert ["val_top1" in row for row in found.metrics] == measured
    for name in ("val_top1", "val_loss", "train_loss"):
        assert found.metrics[-1][name] == usual.metrics[-1][name]
    last = [load_file(run.folder / "checkpoints" / "last.safetensors") for run in (usual, found)]
    assert all(torch.equal(last[1][name], value) for name, value in last[0].items())


def load_model(run: Path) -> torch.nn.Module:
    from convnextv2.weights.loading import load_model

    return load_model(run)


def test_the_images_of_a_part() -> None:
    def parts(**wish: Any) -> tuple[Any, Any]:
        return build_finetune_datasets(spec_of("digits", wish), (16, 16), 1, seed=99)

    whole, val = parts()
    assert (len(whole), len(val)) == (1438, 359)
    few, same = parts(labels=0.1, seed=1)
    assert list(same.source.numbers) == list(val.source.numbers)
    assert 130 < len(few) < 150
    assert set(few.source.numbers) < set(whole.source.numbers)
    assert set(few.source.numbers) != set(parts(labels=0.1, seed=2)[0].source.numbers)
    inner, held = parts(held_out=0.2)
    assert set(inner.source.numbers) | set(held.source.numbers) == set(whole.source.numbers)
    assert not set(inner.source.numbers) & set(held.source.numbers)
    small, small_val = parts(images=100, labels=0.5)
    assert (len(small), len(small_val)) == (50, 100)


def test_frozen_features_of_images_without_augmentation() -> None:
    train, val = build_finetune_datasets(spec_of("digits", {"images": 200}), (16, 16), 1)
    torch.manual_seed(0)
    encoder = create_fcmae(EncoderConfig((1, 1, 1, 1), (4, 8, 8, 8), in_chans=1, patch_size=8), img_size=16).encoder
    encoder.train()
    features = extract(encoder, train)
    assert encoder.training
    assert features.values.shape == (len(train), 16)
    assert features.labels.tolist() == list(train.labels)
    assert (extract(encoder, train).values == features.values).all()
    assert 20 < accuracy("linear", features, extract(encoder, val)) <= 100

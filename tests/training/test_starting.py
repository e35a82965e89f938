"""Runs that start from a checkpoint for other channels or another patch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_helpers import finetune_options, make_images, pretrain_options, weights

from convnextv2.training import finetune, pretrain
from convnextv2.weights import load_checkpoint
from convnextv2.weights.adapting import other_channels, other_stride

STILL: dict[str, Any] = {"epochs": 1, "lr": 1e-12, "weight_decay": 0.0}
STEM = "downsample_layers.0.0.weight"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set", count=4)


@pytest.fixture(scope="module")
def first(images: Path) -> Path:
    """A pre-training of three channels and patch size 8."""
    pretrain(pretrain_options(images, images.parent / "first", epochs=1))
    return images.parent / "first"


def bands(folder: Path, channels: int) -> Path:
    """Images of ``channels`` channels in two classes."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            np.save(folder / name / f"{number}.npy", rng.uniform(0, 1, (40, 40, channels)).astype(np.float32))
    return folder


def test_what_is_left_open_is_as_the_checkpoint_has_it(images: Path, first: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options = pretrain_options(images, tmp_path / "run", init=first, patch_size=None, **STILL)
    result = pretrain(options, log=said.append)
    assert result.model.config.encoder.patch_size == 8
    assert "patch_size: 8" in (tmp_path / "run" / "config.yaml").read_text()
    before = weights(first)
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, before[name], msg=name)
    assert any("tensors loaded; nothing is freshly initialised" in line for line in said)
    usual = pretrain_options(images, tmp_path / "usual", epochs=1, patch_size=None, img_size=64)
    assert pretrain(usual).model.config.encoder.patch_size == 32


def test_pretraining_goes_on_with_other_channels_and_another_patch_size(first: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options = pretrain_options(bands(tmp_path / "set", 4), tmp_path / "run", init=first, patch_size=16, in_chans=4)
    result = pretrain(pretrain_options(**{**vars(options), **STILL}), log=said.append)
    there, here = weights(first)[f"encoder.{STEM}"], weights(tmp_path / "run")[f"encoder.{STEM}"]
    torch.testing.assert_close(here, other_channels(other_stride(there, 2), 4))
    assert np.isfinite(result.last_loss)
    assert any(
        "the decoder's last layer is freshly initialised; the stem is adapted, patch size 8 to 16 and 3 to 4" in line
        for line in said
    )
    resumed = pretrain(pretrain_options(**{**vars(options), **STILL, "epochs": 2, "resume": True}))
    assert resumed.epochs == 2


def test_fine_tuning_with_other_channels(images: Path, first: Path, tmp_path: Path) -> None:
    said: list[str] = []
    shape = {"init": first, "in_chans": 1, "patch_size": 16, "img_size": None}
    result = finetune(finetune_options(images, tmp_path / "run", **shape, **STILL), log=said.append)
    assert result.model.encoder_config.in_chans == 1
    assert any("the stem is adapted, patch size 8 to 16 and 3 to 1 channels" in line for line in said)
    there, here = weights(first)[f"encoder.{STEM}"], weights(tmp_path / "run")[STEM]
    torch.testing.assert_close(here, other_stride(there, 2).sum(1, keepdim=True))
    metadata = load_checkpoint(tmp_path / "run").metadata
    assert (len(metadata["mean"]), metadata["img_size"]) == (1, [32, 32])


def test_bands_by_number(first: Path, tmp_path: Path) -> None:
    given = bands(tmp_path / "set", 5)
    shape = {"init": first, "in_chans": 5, "init_bands": "0,3,2,1,0"}
    finetune(finetune_options(given, tmp_path / "run", **shape, **STILL))
    there, here = weights(first)[f"encoder.{STEM}"], weights(tmp_path / "run")[STEM]
    torch.testing.assert_close(here[:, [3, 2, 1]], there)
    assert float(here[:, [0, 4]].abs().max()) < 1e-6
    finetune(finetune_options(given, tmp_path / "run", **shape, **{**STILL, "epochs": 2}, resume=True))


@pytest.mark.parametrize(("start", "options_of"), [(pretrain, pretrain_options), (finetune, finetune_options)])
def test_bands_that_do_not_fit(images: Path, first: Path, tmp_path: Path, start: Any, options_of: Any) -> None:
    for changes, reason in (
        ({"init_bands": "3,2,1"}, "name that, too"),
        ({"init_bands": "3,2,1", "in_chans": 4, "init": first}, "must be 4 numbers"),
        ({"init_bands": "red", "init": first}, "whole numbers with commas"),
    ):
        with pytest.raises(ValueError, match=f"`init_bands`.*{reason}"):
            start(options_of(images, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()

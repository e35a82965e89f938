"""Crops that are resized in the batch are the ones that the loader would have cut, to a rounding: the bytes between the
two directions are rounded, and which direction comes first is Pillow's choice, by version and size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convnextv2.data import build_pretrain_dataset
from convnextv2.data import resampling as resampling_module
from convnextv2.data.batches import Samples
from convnextv2.data.crops import picture
from convnextv2.data.resampling import Regions, resample

SIZES = [(5, 9), (40, 30), (64, 64), (63, 200), (1, 1), (130, 17)]


def smooth(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    """Pixels with edges and gradients."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(1, height // 4), max(1, width // 4), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))[..., :channels].copy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_it_is_pillows_filter(size: tuple[int, int], channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling_module, "GAP", 1000)  # nothing is averaged beforehand
    monkeypatch.setattr(resampling_module, "AT_ONCE", 2 * channels * 200 * 130)  # some at a time
    parts = [(smooth(*each, channels, number), number % 2 == 1) for number, each in enumerate(SIZES)]
    found = resample(Regions.gather(parts, size), size)
    assert found.shape == (len(parts), *size, channels)
    assert found.dtype == torch.uint8
    for values, (pixels, flipped) in zip(found, parts, strict=True):
        image = picture(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
        expected = np.asarray(image).reshape(*size, channels)
        difference = np.abs(values.numpy().astype(int) - (expected[:, ::-1] if flipped else expected))
        assert difference.max() <= 3
        assert (difference > 1).mean() < 0.01


@pytest.mark.parametrize("size", [(32, 40), (40, 24)])
def test_in_one_direction_it_is_pillows_to_the_bit(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling_module, "GAP", 1000)
    for number, (height, width) in enumerate(SIZES):
        pixels = smooth(height, width, 3, number)
        for target in ((height, size[1]), (size[0], width)):
            (found,) = resample(Regions.gather([(pixels, False)], target), target)
            expected = Image.fromarray(pixels).resize(target[::-1], Image.Resampling.BICUBIC)
            assert (found.numpy() != np.asarray(expected)).mean() < 1e-3  # a half, to the bit, may fall either way


@pytest.mark.parametrize("views", [1, 2])
def test_the_crops_are_those_of_the_loader(image_folder: Callable[..., Path], views: int) -> None:
    images = build_pretrain_dataset(image_folder({"": 10}), (24, 32), seed=2)
    for epoch in (0, 1):
        images.set_epoch(epoch)
        here, there = Samples(images, views=views), Samples(images, views=views, on_device=True)
        one = here.finish(here.collate([here[i] for i in range(10)]))
        other = there.finish(there.collate([there[i] for i in range(10)]))
        assert one.shape == other.shape == (10 * views, 3, 24, 32)
        levels = (one - other).abs() * torch.tensor(images.std)[:, None, None] * 255
        assert float(levels.max()) < 6  # noise: bytes in between are cut off at 0 and 255, too
        assert float(levels.mean()) < 0.3


def test_large_crops_are_averaged_before_they_travel() -> None:
    pixels = smooth(1000, 1205, 3)
    regions = Regions.gather([(pixels, False), (smooth(40, 40, 3), True)], (64, 64))
    assert regions.pixels.shape[1:3] == (143, 173)  # a seventh, 1000 / 64 / 2
    found = resample(regions, (64, 64))[0].numpy().astype(float)
    expected = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC))
    assert 10 * np.log10(255**2 / np.mean((found - expected) ** 2)) > 40

"""What travels as bytes is what a data set's own samples are, bit by bit; what cannot travel so stays floats."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from convnextv2.data import Augmentation, ImageDataset, build_finetune_datasets, build_pretrain_dataset
from convnextv2.data.batches import Samples, take_apart
from convnextv2.data.crops import RandomCrop
from convnextv2.data.loading import make_loader
from convnextv2.data.transforms import sample_seed, sample_words


def batch(samples: Samples, workers: int = 0) -> Any:
    """All samples, floats."""
    (found,) = make_loader(samples, len(samples), workers)
    return samples.finish(found)


def own(images: ImageDataset) -> Any:
    """The samples that the data set itself makes."""
    return torch.utils.data.default_collate([images[number] for number in range(len(images))])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_crops_and_flips_are_those_of_the_data_set(
    image_folder: Callable[..., Path], in_chans: int, workers: int
) -> None:
    images = build_pretrain_dataset(image_folder({"": 12}), (32, 48), in_chans, seed=4)
    samples = Samples(images)
    for epoch in (0, 3):
        images.set_epoch(epoch)
        assert samples[0].dtype == torch.uint8
        assert samples[0].shape == (32, 48, in_chans)
        found = batch(samples, workers)
        assert found.shape == (12, in_chans, 32, 48)
        assert found.is_contiguous()
        assert torch.equal(found, own(images))


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(hflip=0),
        Augmentation(hflip=1, crop_scale=(1, 1)),
        Augmentation(color_jitter=0.4),
        Augmentation(auto_augment="rand-m9-mstd0.5-inc1"),
        Augmentation(auto_augment="augmix-m3"),
        Augmentation(random_erasing=1.0),
        Augmentation(auto_augment="rand-m9", random_erasing=0.5),
    ],
    ids=str,
)
def test_every_augmentation_gives_the_same_samples(
    image_folder: Callable[..., Path], augmentation: Augmentation
) -> None:
    parts = build_finetune_datasets(image_folder({"a": 8, "b": 8}), (32, 32), augmentation=augmentation)
    for images in parts:
        samples = Samples(images)
        assert (samples.taken is None) == (augmentation.random_erasing > 0 and images is parts[0])
        found, labels = batch(samples)
        expected, own_labels = own(images)
        assert torch.equal(found, expected)
        assert torch.equal(labels, own_labels)


def test_other_numbers_of_channels_stay_floats(tmp_path: Path) -> None:
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).integers(0, 255, (20, 30, 5), dtype=np.uint8))
    images = build_pretrain_dataset(tmp_path, (16, 16), 5)
    samples = Samples(images)
    assert samples.taken is None
    assert torch.equal(batch(samples), own(images))
    with pytest.raises(ValueError, match="only augmentation"):
        Samples(images, on_device=True)


def test_a_data_set_that_makes_its_samples_itself_is_left_alone(image_folder: Callable[..., Path]) -> None:
    class Doubled(ImageDataset):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index) * 2

    images = build_pretrain_dataset(image_folder({"": 3}), (32, 32))
    images.__class__ = Doubled
    assert torch.equal(batch(Samples(images)), own(images))
    with pytest.raises(ValueError, match="no samples of their own"):
        Samples(images, views=2)


@pytest.mark.parametrize(("height", "width"), [(40, 30), (30, 40), (1, 1), (300, 20), (20, 300), (224, 224)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (1.0, 1.0)])
def test_crops_are_those_that_timm_draws(height: int, width: int, scale: tuple[float, float]) -> None:
    crop = RandomCrop((32, 32), scale, (3 / 4, 4 / 3), 0.5)
    image = Image.new("RGB", (width, height))
    for index in range(20):
        with sample_seed(3, 1, index):
            corner = RandomResizedCropAndInterpolation.get_params(image, scale, (3 / 4, 4 / 3))
            flipped = bool(torch.rand(1) < 0.5)
        assert crop.draw(height, width, sample_words(3, 1, index)) == (*corner, flipped)


def test_drawing_a_crop_touches_no_global_generator(image_folder: Callable[..., Path]) -> None:
    samples = Samples(build_pretrain_dataset(image_folder({"": 2}), (32, 32)))
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    samples[0]
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("augmentation", [None, Augmentation(random_erasing=1.0), Augmentation(color_jitter=0.3)])
@pytest.mark.parametrize("on_device", [False, True])
def test_views_are_several_crops_of_one_image(
    image_folder: Callable[..., Path], augmentation: Augmentation | None, on_device: bool
) -> None:
    images, _ = build_finetune_datasets(image_folder({"a": 6, "b": 6}), (32, 32), augmentation=augmentation)
    if on_device and augmentation is not None:
        return
    decoded = 0
    load = images.load

    def counted(*arguments: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return load(*arguments)

    images.load = counted  # type: ignore[method-assign]
    found, labels = batch(Samples(images, views=3, on_device=on_device))
    assert decoded == len(images)
    assert len(found) == len(labels) == 3 * len(images)
    assert labels.tolist() == [label for label in images.labels or [] for _ in range(3)]
    first, first_labels = batch(Samples(images, on_device=on_device))
    assert torch.equal(found[::3], first)  # another number of views leaves the first as it was
    assert torch.equal(labels[::3], first_labels)
    for view in (1, 2):
        assert not torch.equal(found[view::3], first)
    assert not torch.equal(found[1::3], found[2::3])


def test_torchvision_resizes_the_same_crops(image_folder: Callable[..., Path]) -> None:
    images = build_pretrain_dataset(image_folder({"": 12}), (32, 48), seed=4)
    one, other = (
        torch.stack([s[i] for i in range(12)]).int() for s in (Samples(images), Samples(images, resizer="torchvision"))
    )
    assert int((one - other).abs().max()) <= 2
    assert float((one != other).float().mean()) < 0.02


def test_what_is_not_ours_is_not_taken_apart() -> None:
    assert take_apart(torch.as_tensor) is None
    assert take_apart(lambda image: image) is None


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(random_erasing=1.0)])
def test_passes_augment_each_image_anew(image_folder: Callable[..., Path], augmentation: Augmentation) -> None:
    images, _ = build_finetune_datasets(image_folder({"a": 4, "b": 4}), (32, 48), augmentation=augmentation)
    samples = Samples(images, passes=2)
    assert len(samples) == 2 * len(images)
    pixels, labels = batch(samples)
    first, second = pixels.chunk(2)
    assert torch.equal(labels, torch.tensor([*images.labels, *images.labels]))
    assert torch.equal(first, own(images)[0])
    assert all(not torch.equal(one, other) for one, other in zip(first, second, strict=True))

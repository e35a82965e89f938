import random

import numpy as np
import pytest
import torch
from PIL import Image

from convnextv2.data.transforms import Augmentation, image_transform, preprocessing_from_metadata, sample_seed


def test_sample_seed_leaves_the_global_generators_alone() -> None:
    draws = []
    for inside in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        if inside:
            with pytest.raises(KeyError), sample_seed(1, 2, 3):
                random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
                raise KeyError
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert draws[0] == draws[1]


def test_extreme_aspect_is_cut_before_it_is_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *rest: object, **options: object) -> Image.Image:
        nonlocal largest
        largest = max(largest, *size)
        return resize(self, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert image_transform((224, 224), (0.5,) * 3, (0.5,) * 3)(Image.new("RGB", (2, 5000))).shape == (3, 224, 224)
    assert 224 <= largest <= 8 * 256


def test_flip_and_crop_options() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16] = 255
    whole = Augmentation(crop_scale=(1, 1), hflip=1)
    flipped = image_transform((32, 32), (0.5,) * 3, (0.5,) * 3, whole)(Image.fromarray(pixels))
    assert flipped[0, 0, 0] == -1
    assert flipped[0, 0, -1] == 1
    for wrong in ({"crop_scale": (0, 1)}, {"crop_scale": (1, 0.5)}, {"hflip": 2}, {"color_jitter": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Augmentation(**wrong)  # type: ignore[arg-type]


def test_preprocessing_from_metadata() -> None:
    imagenet = preprocessing_from_metadata({}, 3)
    assert imagenet[2] == (224, 224)
    assert imagenet[0][0] == 0.485
    given = {"mean": "[0.1, 0.2, 0.3]", "std": [1, 2, 3], "img_size": [64, 96]}
    assert preprocessing_from_metadata(given, 3) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), (64, 96))
    for wrong in ({"mean": "nonsense"}, {**given, "img_size": [0]}, {**given, "std": [1]}):
        with pytest.raises(ValueError, match=r"mean|img_size|expected"):
            preprocessing_from_metadata(wrong, 3)
    with pytest.raises(ValueError, match="mean and std"):
        preprocessing_from_metadata({}, 5)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m9-mstd0.5-inc1", "rand-m10", "augmix-m10", "original"])
def test_posterization_keeps_a_bit_at_every_level(policy):
    """At its highest level timm asks Pillow for 0 bits, which is an error there."""
    augmentation = Augmentation((0.2, 1), 0.5, auto_augment=policy)
    transform = image_transform((32, 32), (0.5,) * 3, (0.5,) * 3, augmentation)
    (policy_step,) = [step for step in transform.transforms if hasattr(step, "ops") or hasattr(step, "policy")]
    policies = [getattr(policy_step, "ops", []), *getattr(policy_step, "policy", [])]
    operations = [operation for one in policies for operation in one if operation.name.startswith("Posterize")]
    assert operations
    for operation in operations:
        operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10, 0
        operation(Image.new("RGB", (8, 8), "white"))

"""From a decoded image to a normalised tensor: timm's transforms, made reproducible per sample."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from convnextv2.data.augmentation import Augmentation, Statistics
from convnextv2.data.crops import sample_words
from convnextv2.data.metadata import IMAGE_METADATA, numbers_of

Transform = Callable[[Any], Tensor]
Preprocessing = tuple[tuple[float, ...], tuple[float, ...], tuple[int, int]]
"""Mean, standard deviation, (height, width)."""

DEFAULT_STATISTICS: Mapping[int, Statistics] = {1: ((0.5,), (0.5,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
"""Mean and standard deviation for pixels in [0, 1], by number of channels; ImageNet's for 3."""

WIDEST_ASPECT = 8
"""Longer sides are cut to this multiple of the shorter one before the evaluation's resize, which scales the shorter
side: the centre crop throws the rest away anyhow, but a 1×20000 image would first become gigabytes."""


def check_statistics(mean: Sequence[float], std: Sequence[float], in_chans: int) -> None:
    """Raise ValueError unless there is one finite mean and one positive standard deviation a channel."""
    if len(mean) != in_chans or len(std) != in_chans:
        raise ValueError(f"expected {in_chans} means and standard deviations, got {len(mean)} and {len(std)}")
    if not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        raise ValueError(f"mean must be finite and std positive, got mean={list(mean)}, std={list(std)}")


def preprocessing_from_metadata(
    metadata: Mapping[str, Any], in_chans: int, default_size: tuple[int, int] = (224, 224)
) -> Preprocessing:
    """What a checkpoint says about its images: (mean, std, (H, W)).

    ``metadata`` has ``mean``, ``std`` and ``img_size`` as lists or JSON text; what is missing gets the default for
    ``in_chans`` channels, and ``default_size``. Raises ValueError if an entry is malformed, or nothing is known for
    this number of channels.
    """
    mean, std, size = (numbers_of(metadata, name) for name in IMAGE_METADATA)
    if mean is None or std is None:
        if in_chans not in DEFAULT_STATISTICS:
            raise ValueError(f"the checkpoint does not say the mean and std of its {in_chans} channels")
        mean, std = DEFAULT_STATISTICS[in_chans]
    check_statistics(mean, std, in_chans)
    size = default_size if size is None else size
    return mean, std, (int(size[0]), int(size[-1]))


@contextlib.contextmanager
def sample_seed(seed: int, epoch: int, index: int, view: int = 0) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generator for one sample, and give them their state back afterwards.

    With it a sample looks the same in the same epoch whatever was drawn before: after a resume, and with any number
    of workers. Costs well below a millisecond.
    """
    words = sample_words(seed, epoch, index, view)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  # timm draws from it
    random.seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002
    try:
        torch.default_generator.manual_seed(int(words[2]))
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def image_transform(
    img_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], augmentation: Augmentation | None = None
) -> Transform:
    """To (H, W), bicubic, and normalised.

    With ``augmentation``, whose ``crop_scale`` and ``hflip`` must be chosen, a random resized crop, flip, and what else
    it asks for. Without a centre crop, which keeps 0.875 of a side as usual, and all of a small image.

    With one or three numbers in ``mean`` and ``std`` the transform takes RGB images, else ``[H, W, C]`` arrays, for
    which there are crops, flips and erasing only: ValueError if colour augmentation is asked for.
    """
    share = 0.875 if min(img_size) >= 160 else 1.0
    if len(mean) not in (1, 3):
        from torchvision import transforms as tv

        bicubic, normalize = tv.InterpolationMode.BICUBIC, tv.Normalize(mean, std)
        if augmentation is None:
            height, width = (round(side / share) for side in img_size)
            aspect = functools.partial(_cut_to_aspect, aspect=width / height)
            crop = tv.Resize((height, width), bicubic), tv.CenterCrop(img_size)
            return tv.Compose([tv.ToTensor(), aspect, *crop, normalize])
        if augmentation.color_jitter or augmentation.auto_augment:
            raise ValueError(
                f"color_jitter and auto_augment know images of 1 or 3 channels, not {len(mean)}; leave them out"
            )
        resize = tv.RandomResizedCrop(img_size, augmentation.crop_scale, interpolation=bicubic)
        erase = tv.RandomErasing(augmentation.random_erasing, value="random")
        return tv.Compose([tv.ToTensor(), resize, tv.RandomHorizontalFlip(augmentation.hflip), normalize, erase])
    from timm.data import create_transform

    options: dict[str, Any] = {"is_training": False, "crop_pct": share}
    if augmentation is not None:
        options = {"is_training": True, "scale": augmentation.crop_scale, "hflip": augmentation.hflip}
        options |= {"color_jitter": augmentation.color_jitter, "auto_augment": augmentation.auto_augment}
        options |= {"re_prob": augmentation.random_erasing, "re_mode": "pixel"}
    repeats = 3 // len(mean)  # for one channel, gray images go through as three equal ones, of which the first is left
    options |= {"mean": tuple(mean) * repeats, "std": tuple(std) * repeats, "interpolation": "bicubic"}
    transform = create_transform((3, *img_size), **options)
    if augmentation is None:
        transform.transforms.insert(0, _limit_aspect)
    if len(mean) == 1:
        transform.transforms.append(operator.itemgetter(slice(1)))
    # At the highest level timm's RandAugment, AugMix and AutoAugment posterize to no bit, which Pillow refuses from
    # version 13 on (before, the image turned black).
    for step in transform.transforms:
        policies = [getattr(step, "ops", []), *getattr(step, "policy", [])]
        for operation in itertools.chain(*policies):
            if operation.name.startswith("Posterize"):
                operation.level_fn = functools.partial(_at_least_one_bit, operation.level_fn)
    return transform


def _at_least_one_bit(level_function: Callable[..., tuple[int, ...]], *args: Any) -> tuple[int, ...]:
    bits, *rest = level_function(*args)
    return max(1, bits), *rest


def _limit_aspect(image: Image.Image) -> Image.Image:
    """Cut a PIL image around its centre so that no side is longer than :data:`WIDEST_ASPECT` times the other."""
    width, height = image.size
    limit = WIDEST_ASPECT * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(0, width - limit) // 2, max(0, height - limit) // 2
    return image.crop((left, top, left + min(width, limit), top + min(height, limit)))


def cut_to_aspect(size: tuple[int, ...], aspect: float) -> tuple[int, int]:
    """The largest (height, width) within ``size`` of the aspect ratio (width / height) wanted."""
    return max(1, min(size[0], round(size[1] / aspect))), max(1, min(size[1], round(size[0] * aspect)))


def _cut_to_aspect(image: Tensor, aspect: float) -> Tensor:
    """Cut ``[C, H, W]`` around its centre to the aspect ratio (width / height) wanted."""
    (height, width), (high, wide) = image.shape[1:], cut_to_aspect(image.shape[1:], aspect)
    top, left = (height - high) // 2, (width - wide) // 2
    return image[:, top : top + high, left : left + wide]

"""Images and masks changed alike: torchvision's transforms on pairs; and whole images as windows take them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convnextv2.data.rasters import Raster
from convnextv2.data.transforms import Statistics
from convnextv2.segmentation.masks import IGNORED
from convnextv2.segmentation.pairs import Pair, size_of


@dataclass(frozen=True)
class PairAugmentation:
    """Random changes of training pairs.

    Args:
        scale: least and largest factor that images are resized by before they are cropped, drawn evenly in its
            logarithm; crops of 1 are of the images' own pixels, as windows are in prediction.
        hflip, vflip: probabilities of flips.
        color_jitter: strength, of images of 1 or 3 channels.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0


def pixels(image: Any, channels: int) -> Tensor:
    """``[H, W, C]`` of a decoded image: uint8 of photographs, float32 of others, NaN where there is no data."""
    if isinstance(image, Raster):
        return torch.from_numpy(image.floats())
    values = torch.from_numpy(np.array(image))
    return values[..., :channels] if channels in (1, 3) else values


def normalised(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """float32 ``[…, C, H, W]`` normalised of pixels ``[…, C, H, W]``, 0 where there is no data; ``mean`` and ``std``
    are ``[C, 1, 1]``."""
    if values.dtype == torch.uint8:
        return (values.float() / 255 - mean) / std
    return ((values - mean) / std).nan_to_num(0.0, 0.0, 0.0)


def columns(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation as :func:`normalised` takes them."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in statistics)
    return mean, std


class TrainTransform:
    """Pairs to a crop of a size: normalised ``[C, H, W]`` and classes ``[H, W]``.

    Draws from torch's generator, which the data set seeds for every sample. What an image does not fill is of the mean
    colour, and ignored.

    Args:
        size: (H, W) in pixels.
    """

    def __init__(self, size: tuple[int, int], statistics: Statistics, augmentation: PairAugmentation) -> None:
        from torchvision.transforms import v2

        strength = augmentation.color_jitter
        self.size, self.channels, self.augmentation = size, len(statistics[0]), augmentation
        if strength and self.channels not in (1, 3):
            raise ValueError(f"`color_jitter` knows images of 1 or 3 channels, not {self.channels}; leave it out")
        self._statistics = columns(statistics)
        steps: list[Any] = [v2.RandomHorizontalFlip(augmentation.hflip), v2.RandomVerticalFlip(augmentation.vflip)]
        if strength:
            steps.append(v2.ColorJitter(strength, strength, strength, min(0.5, strength / 4)))
        self._steps = v2.Compose(steps)

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        from torchvision import tv_tensors

        image, mask = self._crop(pair)
        image, mask = self._steps(tv_tensors.Image(image), tv_tensors.Mask(mask))
        image = normalised(image.as_subclass(Tensor)[: self.channels], *self._statistics)
        return place(image, mask.as_subclass(Tensor), self.size, _uniform(2))

    def _crop(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A part of the pair, at random, resized: ``[C, h, w]`` and ``[h, w]`` of at most the size."""
        from torchvision.transforms.v2 import functional as F

        low, high = self.augmentation.scale
        factor, *corner = _uniform(3)
        factor = math.exp(math.log(low) + factor * (math.log(high) - math.log(low)))
        starts, ends, sizes = [], [], []
        for length, wanted, share in zip(size_of(pair.image), self.size, corner, strict=True):
            taken = min(length, max(1, round(wanted / factor)))
            starts.append(int(share * (length - taken + 1)))
            ends.append(starts[-1] + taken)
            sizes.append(min(wanted, max(1, round(taken * factor))))
        (top, left), (bottom, right) = starts, ends
        if isinstance(pair.image, Raster):
            part = pair.image[top:bottom, left:right].floats()
        elif isinstance(pair.image, np.ndarray):
            part = pair.image[top:bottom, left:right]
        else:
            part = np.array(pair.image.crop((left, top, right, bottom)))
        image = torch.from_numpy(np.ascontiguousarray(part)).permute(2, 0, 1)
        mask = torch.from_numpy(np.ascontiguousarray(pair.mask[top:bottom, left:right]))
        if list(mask.shape) == sizes:
            return image, mask
        image = F.resize_image(image, sizes, F.InterpolationMode.BILINEAR, antialias=True)
        return image, F.resize_mask(mask[None], sizes)[0]


class WholeTransform:
    """Pairs to pixels ``[H, W, C]``, as :func:`pixels` has them, and classes ``[H, W]``; nothing is drawn."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        return pixels(pair.image, self.channels), torch.from_numpy(pair.mask)


class CentreTransform:
    """Pairs to the middle of their images, normalised ``[C, H, W]``."""

    def __init__(self, size: tuple[int, int], statistics: Statistics) -> None:
        self.size, self._statistics = size, columns(statistics)

    def __call__(self, pair: Pair) -> Tensor:
        mean, std = self._statistics
        whole = pixels(pair.image, len(mean)).permute(2, 0, 1)
        top, left = (max(0, length - wanted) // 2 for length, wanted in zip(whole.shape[1:], self.size, strict=True))
        part = normalised(whole[:, top : top + self.size[0], left : left + self.size[1]], mean, std)
        return place(part, torch.zeros(part.shape[1:], dtype=torch.uint8), self.size, (0.5, 0.5))[0]


def _uniform(count: int) -> list[float]:
    return torch.rand(count).tolist()


def place(image: Tensor, mask: Tensor, size: tuple[int, int], share: Any) -> tuple[Tensor, Tensor]:
    """Both on a ground of ``size``: zeros and ignored classes; ``share`` of what is left over lies above and left."""
    if tuple(mask.shape) == size:
        return image.contiguous(), mask.contiguous()
    top, left = (int(part * (whole - own + 1)) for part, whole, own in zip(share, size, mask.shape, strict=True))
    ground = image.new_zeros(image.shape[0], *size)
    ground[:, top : top + mask.shape[0], left : left + mask.shape[1]] = image
    ignored = torch.full(size, IGNORED, dtype=torch.uint8)
    ignored[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return ground, ignored

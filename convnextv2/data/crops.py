"""Random crops and flips drawn from generators of the sample's own, and what resizes them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


class Box(NamedTuple):
    """A part of an image, in pixels, and whether it is turned left to right."""

    top: int
    left: int
    height: int
    width: int
    flipped: bool


@dataclass(frozen=True)
class RandomCrop:
    """A random resized crop and a flip.

    :meth:`draw` gives what timm's and torchvision's transforms draw from the global generators where
    :func:`~.transforms.sample_seed` seeds them, without the price of seeding and restoring three of them.

    Args:
        size: (H, W) in pixels after the resize.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height.
        hflip: probability of a flip.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float

    def draw(self, height: int, width: int, words: Sequence[int]) -> Box:
        """The crop of an image of that size; ``words`` from :func:`sample_words`."""
        flipped = False
        if self.hflip > 0:
            flip = torch.Generator()
            flip.manual_seed(int(words[2]))
            flipped = bool(torch.rand(1, generator=flip) < self.hflip)
        return Box(*self._corner(height, width, random.Random(int(words[0]))), flipped)

    def _corner(self, height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
        low, high = self.ratio
        for _ in range(10):
            area = rng.uniform(*self.scale) * (width * height)
            aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w <= width and h <= height:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        w, h = width, height  # the largest one in the middle that is neither too wide nor too narrow
        if width / height < low:
            h = round(w / low)
        elif width / height > high:
            w = round(h * high)
        return (height - h) // 2, (width - w) // 2, h, w

    def cut(self, image: Image.Image | NDArray[np.uint8], box: Box, channels: int, resizer: str) -> Tensor:
        """The crop, uint8 ``[H, W, C]``, of an RGB image or of pixels ``[h, w, C]``, resized (bicubic) and flipped."""
        top, left, height, width, flipped = box
        if resizer == "pillow":
            if isinstance(image, Image.Image):
                part = image.crop((left, top, left + width, top + height))
            else:
                part = picture(image[top : top + height, left : left + width])
            part = part.resize(self.size[::-1], Image.Resampling.BICUBIC)
            if flipped:
                part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return pixels_of(part, channels)
        from torchvision.transforms.v2 import functional as v2

        values = torch.from_numpy(region(image, box, channels)).permute(2, 0, 1)
        values = v2.resize(values, list(self.size), v2.InterpolationMode.BICUBIC, antialias=True)
        return (values.flip(2) if flipped else values).permute(1, 2, 0)


def sample_words(seed: int, epoch: int, index: int, view: int = 0) -> Any:
    """Three seeds, of Python's, numpy's and torch's generator, for a sample, or for a further view of it."""
    place = (seed, epoch, index, view) if view else (seed, epoch, index)
    return np.random.SeedSequence(place).generate_state(3)


def region(image: Image.Image | NDArray[np.uint8], box: Box, channels: int) -> NDArray[np.uint8]:
    """The pixels ``[height, width, C]`` of the box, as they are stored: a copy."""
    top, left, height, width, _ = box
    if isinstance(image, Image.Image):
        found = np.array(image.crop((left, top, left + width, top + height)))
        return np.ascontiguousarray(found[..., :channels])
    return image[top : top + height, left : left + width].copy()


def picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """Pixels ``[H, W, C]`` of 1 or 3 channels as an image, gray or RGB."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def pixels_of(image: Image.Image, channels: int) -> Tensor:
    """uint8 ``[H, W, C]`` of an image that is gray, or of equal channels where one is wanted."""
    values: NDArray[Any] = np.array(image)
    return torch.from_numpy(values if values.ndim == 3 else values[..., None])[..., :channels]

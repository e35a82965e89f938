"""Crops of a whole batch resized on its device, as two matrix products: Pillow's filter, for any device of torch.

Sampling at points (``grid_sample``) would alias where a crop is larger than what comes out; functions that resize one
image at a time launch some kernels for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convnextv2.data.crops import picture

AT_ONCE = 2**27
"""Numbers of the largest intermediate that is made, about."""
GAP = 2
"""A crop is averaged over blocks of pixels before it travels where it stays this many times as large as needed."""


class Regions(NamedTuple):
    """Parts of images, to be resized.

    Args:
        pixels: uint8 ``[N, h, w, C]``, each in the upper left corner; what lies beyond it is arbitrary.
        extents: float32 ``[N, 2]``: height and width of each, in pixels.
        flipped: bool ``[N]``.
    """

    pixels: Tensor
    extents: Tensor
    flipped: Tensor

    @classmethod
    def gather(cls, parts: Sequence[tuple[NDArray[np.uint8], bool]], size: tuple[int, int]) -> Regions:
        """Pixels ``[h, w, C]`` and whether they are flipped, on their way to ``size`` (H, W)."""
        reduced = [_reduced(pixels, size) for pixels, _ in parts]
        height, width, channels = (max(pixels.shape[axis] for pixels, _ in reduced) for axis in range(3))
        whole = torch.empty(len(parts), height, width, channels, dtype=torch.uint8)
        array = whole.numpy()
        for number, (pixels, _) in enumerate(reduced):
            array[number, : pixels.shape[0], : pixels.shape[1]] = pixels
        return cls(whole, torch.tensor([extent for _, extent in reduced]), torch.tensor([flip for _, flip in parts]))


def _reduced(pixels: NDArray[np.uint8], size: tuple[int, int]) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    height, width = pixels.shape[:2]
    factor = int(min(height / size[0], width / size[1]) / GAP)
    if factor < 2:
        return pixels, (float(height), float(width))
    smaller = np.asarray(picture(pixels).reduce(factor))
    return smaller.reshape(*smaller.shape[:2], pixels.shape[2]), (height / factor, width / factor)


def resample(regions: Regions, size: tuple[int, int]) -> Tensor:
    """uint8 ``[N, H, W, C]`` of ``size`` (H, W), flipped where that is asked for."""
    pixels, extents, flipped = regions
    number, height, width, channels = pixels.shape
    rows = _weights(extents[:, 0], height, size[0], torch.zeros_like(flipped))
    columns = _weights(extents[:, 1], width, size[1], flipped).transpose(1, 2)
    step = max(1, AT_ONCE // (channels * max(height, size[0]) * max(width, size[1])))
    done = []
    for some in (slice(first, first + step) for first in range(0, number, step)):
        values = pixels[some].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        # Rounded after each direction, a half up, as Pillow does.
        values = (
            (values.flatten(1, 2) @ columns[some]).add_(0.5).floor_().clamp_(0, 255).view(-1, channels, height, size[1])
        )
        values = (rows[some, None] @ values).add_(0.5).floor_().clamp_(0, 255)
        done.append(values.to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(done)


def _weights(extents: Tensor, stored: int, size: int, reverse: Tensor) -> Tensor:
    """``[N, size, stored]``: share of each stored pixel in each of the result, by Pillow's bicubic filter (a = -1/2),
    which is as wide as what it shrinks."""
    scale = (extents / size)[:, None, None]
    out = torch.arange(size, device=extents.device, dtype=torch.float32)
    out = torch.where(reverse[:, None], size - 1 - out, out)[:, :, None]
    pixel = torch.arange(stored, device=extents.device, dtype=torch.float32) + 0.5
    x = ((pixel - (out + 0.5) * scale) / scale.clamp_min(1)).abs()
    near = ((1.5 * x - 2.5) * x) * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    # The last block of a crop that was averaged may be a partial one.
    weights = weights * (pixel - 0.5 < extents[:, None, None].ceil())
    return weights / weights.sum(-1, keepdim=True)

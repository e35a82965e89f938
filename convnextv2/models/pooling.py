"""From feature maps to the numbers that a classifier's final norm is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from convnextv2.models.config import POOLINGS

EPS = 1e-6
"""Of the variance, so that the gradient of its root is finite where all cells are alike."""
Maps = Tensor | Sequence[Tensor]
"""The map of the last stage, ``[B, C, h, w]``, or those of all stages."""


def pooled_width(dims: Sequence[int], pooling: str) -> int:
    """How many numbers come of an image whose stages have ``dims`` channels."""
    return {"mean": dims[-1], "mean_std": 2 * dims[-1], "stages": 2 * sum(dims)}[pooling]


def maps_of(encoder: Any, images: Tensor, pooling: str) -> Maps:
    """The maps that are pooled of ``images`` ``[B, in_chans, H, W]``.

    Raises ValueError if they are of all stages, and ``encoder`` is no network of ours, which can be asked for them.
    """
    if pooling != "stages":
        maps: Tensor = encoder.forward_features(images)
        return maps
    if not hasattr(encoder, "forward_stages"):
        raise ValueError(f"{type(encoder).__name__} has no maps but the last one; pooling `stages` needs those of all")
    return [features for features, _ in encoder.forward_stages(images)]


def pool(maps: Maps, pooling: str) -> Tensor:
    """Maps to ``[B, C]``, or to ``[B, 2C]`` with ``mean_std``: means first; with ``stages`` that of each, in order.

    Raises ValueError if ``stages`` is to pool one map.
    """
    if pooling == "stages":
        if not isinstance(maps, Sequence):
            raise ValueError("pooling `stages` takes the maps of all stages, not one; the network itself takes images")
        return torch.cat([pool(one, "mean_std") for one in maps], 1)
    last = cast(Tensor, maps)
    mean = last.mean((2, 3))
    if pooling == "mean":
        return mean
    deviation = (last.float().var((2, 3), correction=0) + EPS).sqrt()
    return torch.cat([mean, deviation.to(mean.dtype)], 1)


def pooling_of(head: Mapping[str, Tensor], dims: Sequence[int]) -> str:
    """The way to pool that a final norm is for; ``mean`` where there is none, or its width is of no way."""
    width = head["norm.weight"].numel() if "norm.weight" in head else dims[-1]
    return next((name for name in POOLINGS if width == pooled_width(dims, name)), "mean")

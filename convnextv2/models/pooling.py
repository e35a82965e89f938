"""From the last stage's features to the numbers that a classifier's final norm is given."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from convnextv2.models.config import POOLINGS

EPS = 1e-6
"""Of the variance, so that the gradient of its root is finite where all cells are alike."""


def pool(features: Tensor, pooling: str) -> Tensor:
    """``[B, C, h, w]`` to ``[B, C]``, or to ``[B, 2C]`` with ``mean_std``: means first."""
    mean = features.mean((2, 3))
    if pooling == "mean":
        return mean
    deviation = (features.float().var((2, 3), correction=0) + EPS).sqrt()
    return torch.cat([mean, deviation.to(mean.dtype)], 1)


def pooling_of(head: Mapping[str, Tensor], channels: int) -> str:
    """The way to pool that a final norm is for; ``mean`` where there is none, or its width is of no way."""
    width = head["norm.weight"].numel() if "norm.weight" in head else channels
    return next((name for name, factor in POOLINGS.items() if width == factor * channels), "mean")

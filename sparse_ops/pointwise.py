"""Arithmetic of single cells and of norms over them, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MLPWeights(NamedTuple):
    """What the pointwise half of a block computes with: ``pwconv2(grn(gelu(pwconv1(layer_norm(x)))))``."""

    norm_weight: Tensor
    """``[C]``, as ``norm_bias``."""
    norm_bias: Tensor
    w1: Tensor
    """``[D, C]``."""
    b1: Tensor
    """``[D]``, as ``gamma`` and ``beta``."""
    gamma: Tensor
    beta: Tensor
    w2: Tensor
    """``[C, D]``."""
    b2: Tensor
    """``[C]``."""

    @staticmethod
    def shapes(channels: int, hidden: int) -> list[tuple[int, ...]]:
        """Those of the tensors, in their order, for C and D."""
        return [(channels,)] * 2 + [(hidden, channels), *[(hidden,)] * 3, (channels, hidden), (channels,)]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of ``dtype`` are taken in: float32 for 16 bits, else itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 where it has 16 bits, else as it is."""
    return x.to(wide_dtype(x.dtype))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on ``device`` where it is switched on, else None."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # torch raises for meta
        return None
    return torch.get_autocast_dtype(device.type)


def channel_norm(energy: Tensor) -> Tensor:
    """Square root of a sum of squares, with gradient 0 at 0 (a dead channel, an image without visible patches)."""
    positive = energy > 0
    return torch.where(positive, torch.where(positive, energy, 1).sqrt(), 0)


def grn_scale(energy: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """Factor ``1 + gamma · N(G(x))`` ``[G, D]`` of global response normalisation (ConvNeXt V2, eq. 1-3, with residual).

    Args:
        energy: ``[G, D]`` sums of squares of a channel over the cells of each group.
        gamma: ``[D]``.
        eps: added to the mean of the norms over the channels.
    """
    norm = channel_norm(energy)
    return 1 + gamma * (norm / (norm.mean(-1, keepdim=True) + eps))


def pointwise_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1×1 convolution on channels-last features: ``weight`` is ``[out, in]`` or ``[out, in, 1, 1]``."""
    return F.linear(x, weight.flatten(1), bias)

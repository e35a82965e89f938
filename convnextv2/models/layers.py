"""Layers that know the grid they run on. Channels are last everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_ops.grid import Grid

EPS = 1e-6
"""Added to the variance of LayerNorm and to the mean norm of GRN, as in the official code."""


class GRN(nn.Module):
    """Global response normalisation (ConvNeXt V2, section 3.2): ``x · (1 + gamma · N(G(x))) + beta``.

    ``G`` is the L2 norm of a channel over the visible cells, ``N`` divides it by its mean over the channels. Norms
    are computed in float32 or wider; a channel that is zero everywhere has norm 0 and gradient 0, not NaN.

    Args:
        dim: channels. The parameters have the shape ``[1, 1, 1, dim]`` of the official dense network.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return grid.grn(x, self.gamma.flatten(), self.beta.flatten(), EPS)


class DropPath(nn.Module):
    """Stochastic depth, drawn per image from torch's generator and scaled so that the expectation is kept.

    Args:
        rate: probability that the branch of an image is dropped, in training mode only.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        factor = torch.empty(grid.batch_size, 1, dtype=x.dtype, device=x.device).bernoulli_(keep).div_(keep)
        return grid.image_scale(x, factor)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def init_weights(module: nn.Module) -> None:
    """Truncated normal of std 0.02 for every weight of two or more axes, zero biases (official encoder's own)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

"""What blocks are made of beside torch's own layers."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_ops.grid import Grid

EPS = 1e-6
"""Added to the variance of LayerNorm and to the mean norm of GRN, as in the official code."""


class DropPath(nn.Module):
    """Stochastic depth: in training the branch of an image is dropped with probability ``rate``.

    Drawn per image from torch's generator and scaled so that the expectation is kept.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    @property
    def idle(self) -> bool:
        """Whether nothing is dropped."""
        return self.rate == 0.0 or not self.training

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if self.idle:
            return x
        keep = 1 - self.rate

        def drop(cells: Tensor) -> Tensor:
            return grid.image_scale(cells, cells.new_empty(grid.batch_size, 1).bernoulli_(keep).div_(keep))

        return grid.pointwise(drop, x)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def init_weights(module: nn.Module) -> None:
    """Truncated normal of std 0.02 for every weight of two or more axes, zero biases (official encoder's own)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

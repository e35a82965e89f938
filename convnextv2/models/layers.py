"""What blocks are made of beside torch's own layers."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_ops.grid import Grid

EPS = 1e-6
"""Added to the variance of LayerNorm and to the mean norm of GRN, as in the official code."""


class DropPath(nn.Module):
    """Stochastic depth: in training the branch of an image is dropped with probability ``rate``.

    Scaled so that the expectation is kept. Drawn per image from torch's generator, or by ``noise`` where that is set:
    numbers ``[B]`` in [0, 1) for the images of the next batch, of which those below ``rate`` are dropped.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate
        self.noise: Tensor | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is dropped."""
        return self.rate == 0.0 or not self.training

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if self.idle:
            return x
        keep, noise = 1 - self.rate, self.noise

        def drop(cells: Tensor) -> Tensor:
            if noise is None:
                kept = cells.new_empty(grid.batch_size, 1).bernoulli_(keep)
            else:
                kept = (noise >= self.rate).to(cells.dtype)[:, None]
            return grid.image_scale(cells, kept.div_(keep))

        return grid.pointwise(drop, x)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def init_weights(module: nn.Module) -> None:
    """Truncated normal of std 0.02 for every weight of two or more axes, zero biases (official encoder's own)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

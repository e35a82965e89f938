"""The ConvNeXt V2 encoder: one definition for dense and sparse grids.

Module names and parameter shapes are those of the official dense network, so a pre-trained encoder loads into the
classifier with ``strict=True`` (but for its head).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from convnextv2.models.config import EncoderConfig, check_image_size
from convnextv2.models.layers import EPS, DropPath, init_weights
from convnextv2.models.recomputing import Recomputing, recomputed
from sparse_ops.grid import MLP, Grid
from sparse_ops.layers import GRN
from sparse_ops.map_grid import MapGrid, runs_on


class Block(nn.Module):
    """Depthwise convolution, LayerNorm, expansion to 4·dim, GELU, GRN, projection, residual (figure 5 of the paper).

    Args:
        dim: channels.
        drop_path: stochastic depth rate of the residual branch.
        kernel_size: side of the depthwise kernel.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, kernel_size: int = 7) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim, EPS)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid, rows: Tensor | None = None) -> Tensor:
        """Features of the grid, ``[B, C, H, W]`` dense and ``[N, C]`` sparse; the same shape comes back.

        With ``rows``, the indices ``[M]`` of cells in row-major order, only those are computed: ``[M, C]``. Then drop
        path must be off: it is per image, and rows are not grouped by image.
        """
        mlp = MLP(self.norm, self.pwconv1, self.act, self.grn, self.pwconv2)
        return grid.residual(x, self.dwconv, mlp, self.drop_path, rows)


class Stage(nn.Sequential):
    """Blocks one after the other."""

    grad_checkpointing = False

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]  # blocks take the grid
        for block in self:
            x = recomputed(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return x


class Stem(nn.Sequential):
    """Patch embedding of stride ``stride``, then LayerNorm: submodules 0 and 1, as in the official network."""

    def __init__(self, in_chans: int, dim: int, stride: int) -> None:
        super().__init__(nn.Conv2d(in_chans, dim, stride, stride=stride), nn.LayerNorm(dim, eps=EPS))

    def forward(self, images: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]  # as above
        conv, norm = cast(nn.Conv2d, self[0]), self[1]
        return grid.pointwise(norm, grid.stem(conv, images))


class Downsample(nn.Sequential):
    """LayerNorm, then 2×2 convolution of stride 2: submodules 0 and 1, as in the official network."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(nn.LayerNorm(dim, eps=EPS), nn.Conv2d(dim, out_dim, 2, stride=2))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]  # as above
        """Features on the grid below ``grid``."""
        norm, conv = self[0], cast(nn.Conv2d, self[1])
        return grid.downsample(conv, grid.pointwise(norm, x))


def check_images(images: Tensor, in_chans: int, patch_size: int, *, dense: bool = False) -> None:
    """Raise ValueError unless images are ``[B, in_chans, H, W]`` of a size that
    :func:`~convnextv2.models.config.check_image_size` lets pass."""
    if images.dim() != 4 or images.shape[1] != in_chans:
        raise ValueError(f"expected images [B, {in_chans}, H, W], got {tuple(images.shape)}")
    check_image_size(tuple(images.shape[2:]), patch_size, dense=dense)


torch.fx.wrap("check_images")  # a symbolic trace knows no shapes


class Encoder(Recomputing):
    """Stem and four stages. Returns features, without final norm and head."""

    backend: str = "auto"
    """Of a dense pass on processors; see :attr:`runs_on`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.encoder_config = config
        stem = Stem(config.in_chans, config.dims[0], config.stem_stride)
        self.downsample_layers = nn.ModuleList([stem, *itertools.starmap(Downsample, itertools.pairwise(config.dims))])
        last = max(sum(config.depths) - 1, 1)
        rates = (config.drop_path_rate * index / last for index in itertools.count())
        self.stages = nn.ModuleList(
            Stage(*(Block(dim, next(rates), config.kernel_size) for _ in range(depth)))
            for depth, dim in zip(config.depths, config.dims, strict=True)
        )
        self.apply(init_weights)

    @property
    def runs_on(self) -> str:
        """What computes the blocks of a dense pass as the network is now: a backend's name, or ``torch: `` and why.

        Single layers with hooks or adapters, traces, transforms and autocast are left to torch's operators besides.
        """
        weight = self.get_parameter("downsample_layers.0.1.weight")
        return runs_on(self.backend, weight.device, weight.dtype, self.encoder_config.kernel_size, self.training)

    def forward_stages(self, images: Tensor, grid: Grid | None = None) -> Iterator[tuple[Tensor, Grid]]:
        """Features and their grid after each of the four stages.

        Args:
            images: ``[B, in_chans, H, W]``.
            grid: the grid after the stem (8 cells a patch side); every cell of ``images`` by default.

        Raises:
            ValueError: if the channels do not fit, or H or W is not divisible by the patch size; a dense grid takes any
                size from the patch size on, and leaves out what does not fill a cell, as the official network does.
        """
        config = self.encoder_config
        grid = MapGrid(images.shape[0], self.backend) if grid is None else grid
        check_images(images, config.in_chans, config.patch_size, dense=grid.takes_any_size)
        grid = grid.native(images, config.kernel_size)
        x = images
        for index, (reduce, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = reduce(x, grid)
            grid = grid.down() if index else grid
            x = stage(x, grid)
            yield grid.plain(x), grid

    def forward_features(self, images: Tensor, grid: Grid | None = None) -> Tensor:
        """Features of the last stage: ``[B, C, H/32, W/32]`` (patch size 32), or ``[N, C]`` on a sparse grid.

        Arguments and errors as :meth:`forward_stages`.
        """
        *_, (features, _) = self.forward_stages(images, grid)
        return features

    def forward(self, images: Tensor, grid: Grid | None = None) -> Tensor:
        """:meth:`forward_features`."""
        return self.forward_features(images, grid)

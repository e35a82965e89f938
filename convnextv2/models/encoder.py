"""The ConvNeXt V2 encoder: one definition for dense and sparse grids.

Module names and parameter shapes are those of the official dense network, so a pre-trained encoder loads into the
classifier with ``strict=True`` (but for its head).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from convnextv2.models.config import EncoderConfig, check_image_size
from convnextv2.models.layers import EPS, GRN, DropPath, init_weights
from sparse_ops.grid import DenseGrid, Grid


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
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid, rows: Tensor | None = None) -> Tensor:
        """``[N, C]`` on a sparse grid, ``[B, H, W, C]`` on a dense one; the same shape comes back.

        With ``rows``, the indices ``[M]`` of cells in row-major order, only those are computed: ``[M, C]``.
        """
        h = grid.depthwise_conv(x, self.dwconv.weight, self.dwconv.bias)
        if grid.fuses_mlp(h):
            h = grid.fused_mlp(
                h,
                (self.norm.weight, self.norm.bias),
                (self.pwconv1.weight, self.pwconv1.bias),
                (self.grn.gamma.flatten(), self.grn.beta.flatten()),
                (self.pwconv2.weight, self.pwconv2.bias),
                norm_eps=EPS,
                grn_eps=EPS,
                rows=rows,
            )
        else:
            h = self.grn(self.act(self.pwconv1(self.norm(h))), grid)
            h = self.pwconv2(h if rows is None else h.flatten(0, -2)[rows])
        if rows is not None:
            assert self.drop_path.rate == 0, "drop path is per image; rows are not grouped by image"
            return x.flatten(0, -2)[rows] + h
        return x + self.drop_path(h, grid)


class Stem(nn.Sequential):
    """Patch embedding of stride ``stride``, then LayerNorm: submodules 0 and 1, as in the official network."""

    def __init__(self, in_chans: int, dim: int, stride: int) -> None:
        super().__init__(nn.Conv2d(in_chans, dim, stride, stride=stride), nn.LayerNorm(dim, eps=EPS))

    def forward(self, images: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]  # a container with its own call
        conv, norm = cast(nn.Conv2d, self[0]), self[1]
        return grid.pointwise(norm, grid.stem(images, conv.weight, conv.bias))


class Downsample(nn.Sequential):
    """LayerNorm, then 2×2 convolution of stride 2: submodules 0 and 1, as in the official network."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(nn.LayerNorm(dim, eps=EPS), nn.Conv2d(dim, out_dim, 2, stride=2))

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:  # type: ignore[override]  # as above
        norm, conv = self[0], cast(nn.Conv2d, self[1])
        return grid.downsample(grid.pointwise(norm, x), conv.weight, conv.bias)


class Encoder(nn.Module):
    """Stem and four stages. Returns features, without final norm and head.

    Args:
        config: depths, widths, channels and patch size.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        dims = config.dims
        self.encoder_config = config
        self.downsample_layers = nn.ModuleList(
            [
                Stem(config.in_chans, dims[0], config.stem_stride),
                *itertools.starmap(Downsample, itertools.pairwise(dims)),
            ]
        )
        last = max(sum(config.depths) - 1, 1)
        rates = (config.drop_path_rate * index / last for index in itertools.count())
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(dim, next(rates), config.kernel_size) for _ in range(depth))
            for depth, dim in zip(config.depths, dims, strict=True)
        )
        self.apply(init_weights)

    def forward_stages(self, images: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Grid]]:
        """Features and their grid after each of the four stages.

        Args:
            images: ``[B, in_chans, H, W]``.
            grid: the grid after the stem (8 cells a patch side).

        Raises:
            ValueError: if the channels do not fit, or H or W is not divisible by the patch size.
        """
        config = self.encoder_config
        if images.dim() != 4 or images.shape[1] != config.in_chans:
            raise ValueError(f"expected images [B, {config.in_chans}, H, W], got {tuple(images.shape)}")
        grid = grid.native()
        stem, *downsamples = self.downsample_layers
        x = stem(images, grid)
        for index, stage in enumerate(self.stages):
            if index:
                x, grid = downsamples[index - 1](x, grid)
            for block in stage.children():
                x = block(x, grid)
            yield grid.rows(x), grid

    def forward_features(self, images: Tensor, grid: Grid | None = None) -> tuple[Tensor, Grid]:
        """Features of the last stage and their grid; a dense grid by default: ``[B, H/32, W/32, C]`` (patch size 32).

        Raises:
            ValueError: if the channels do not fit, or H or W is not divisible by the patch size.
        """
        if images.dim() == 4:
            check_image_size(tuple(images.shape[2:]), self.encoder_config.patch_size)
        *_, last = self.forward_stages(images, DenseGrid(images.shape[0]) if grid is None else grid)
        return last

    def forward(self, images: Tensor, grid: Grid | None = None) -> Tensor:
        """Features of the last stage, channels last: ``[B, h, w, C]`` dense, ``[N, C]`` sparse."""
        return self.forward_features(images, grid)[0]

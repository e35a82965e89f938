"""What the spatial operations of the encoder run on: every cell (:class:`DenseGrid`) or an active set
(:class:`~sparse_ops.sparse_grid.SparseGrid`). A network written against :class:`Grid` has one definition for both.

Features lie between the layers of a network: ``[B, C, H, W]`` on a dense grid, in memory channels last, and ``[N, C]``
on a sparse one. Cells are the same numbers with the channels last, ``[B, H, W, C]`` or ``[N, C]``, as layers that treat
every cell by itself take them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparse_ops.pointwise import grn_scale, widened

GRNScope = Literal["image", "batch"]
GRN_SCOPES: tuple[GRNScope, ...] = ("image", "batch")

torch.fx.wrap("widened")  # it looks at the dtype, which a symbolic trace does not know


class MLP(NamedTuple):
    """The layers of the pointwise half of a block, in their order (ConvNeXt V2, figure 5)."""

    norm: nn.LayerNorm
    pwconv1: nn.Linear
    act: nn.GELU
    grn: Any
    """A :class:`~sparse_ops.layers.GRN`, called with the cells and their grid."""
    pwconv2: nn.Linear


class Grid(ABC):
    """The positions of a feature map at one stage, and the operations that need to know them.

    Args:
        grn_scope: whether GRN norms are taken over each image ("image") or over the whole batch ("batch", as the
            official sparse pre-training does).
    """

    takes_any_size: ClassVar[bool] = False
    """Whether images need not divide into whole patches."""

    def __init__(self, grn_scope: GRNScope = "image") -> None:
        if grn_scope not in GRN_SCOPES:
            raise ValueError(f"grn_scope must be one of {GRN_SCOPES}, got {grn_scope!r}")
        self.grn_scope: GRNScope = grn_scope

    @property
    @abstractmethod
    def batch_size(self) -> int: ...

    @abstractmethod
    def stem(self, layer: nn.Conv2d, images: Tensor) -> Tensor:
        """Non-overlapping patch embedding of images ``[B, C, H, W]``: a convolution whose stride is its kernel size."""

    @abstractmethod
    def depthwise(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        """Depthwise convolution, stride 1, "same" padding."""

    @abstractmethod
    def downsample(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        """2×2 convolution of stride 2: features on the grid :meth:`down`."""

    @abstractmethod
    def down(self) -> Grid:
        """The grid of the next stage."""

    def native(self, images: Tensor, kernel_size: int) -> Grid:
        """The grid to run a whole network on, fed with ``images``: itself, unless a backend has its own.

        Features between :meth:`stem` and :meth:`plain` are then in a form of the backend's.
        """
        return self

    def plain(self, x: Tensor) -> Tensor:
        """Features of a network in the form that the caller knows."""
        return x

    def cells(self, x: Tensor) -> Tensor:
        """Features as cells."""
        return x

    def features(self, cells: Tensor) -> Tensor:
        """Inverse of :meth:`cells`."""
        return cells

    def pointwise(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Features from a layer that treats every cell alike and by itself."""
        return self.features(layer(self.cells(x)))

    def take(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Features, or of the cells in row-major order those with the numbers ``rows`` ``[M]``: ``[M, C]``."""
        return x if rows is None else self.cells(x).flatten(0, -2)[rows]

    def mlp(self, x: Tensor, layers: MLP, rows: Tensor | None = None) -> Tensor:
        """The pointwise half of a block: features, or ``[M, C]`` for the cells ``rows``, see :meth:`take`."""
        h = layers.grn(layers.act(layers.pwconv1(layers.norm(self.cells(x)))), self)
        if rows is not None:
            return layers.pwconv2(h.flatten(0, -2)[rows])
        return self.features(layers.pwconv2(h))

    def residual(self, x: Tensor, dwconv: nn.Conv2d, mlp: MLP, drop_path: Any, rows: Tensor | None = None) -> Tensor:
        """A block, ``x + drop_path(mlp(dwconv(x)))``: features, or ``[M, C]`` for the cells ``rows``, see :meth:`take`.

        ``drop_path`` is called with features and their grid, and is ``idle`` where it returns them as they are.
        """
        h = self.mlp(self.depthwise(dwconv, x), mlp, rows)
        return self.take(x, rows) + drop_path(h, self)

    @abstractmethod
    def image_sum(self, cells: Tensor) -> Tensor:
        """Sum over the cells of each image: ``[B, C]``."""

    @abstractmethod
    def image_scale(self, cells: Tensor, factor: Tensor) -> Tensor:
        """Multiply the cells of image b by ``factor[b]``; ``factor`` is ``[B, C]`` or ``[B, 1]``."""

    def grn(self, cells: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        """Global response normalisation; norms in float32 or wider, output in the dtype of ``cells``."""
        wide = widened(cells)
        energy = self.image_sum(wide.square())
        if self.grn_scope == "batch":
            energy = energy.sum(0, keepdim=True).expand_as(energy)
        scale = grn_scale(energy, gamma.to(wide.dtype), eps)
        return self.image_scale(cells, scale.to(cells.dtype)) + beta.to(cells.dtype)


class DenseGrid(Grid):
    """Every cell of ``[B, C, H, W]``: the layers themselves are called."""

    takes_any_size = True

    def __init__(self, batch_size: int, grn_scope: GRNScope = "image") -> None:
        super().__init__(grn_scope)
        self._batch_size = batch_size

    @property
    def batch_size(self) -> int:
        return self._batch_size

    def stem(self, layer: nn.Conv2d, images: Tensor) -> Tensor:
        return layer(self.features(self.cells(images).contiguous()))  # in memory channels last from here on

    def depthwise(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return layer(x)

    def downsample(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return layer(x)

    def down(self) -> DenseGrid:
        return self

    def cells(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)

    def features(self, cells: Tensor) -> Tensor:
        return cells.permute(0, 3, 1, 2)

    def image_sum(self, cells: Tensor) -> Tensor:
        return cells.sum((1, 2))

    def image_scale(self, cells: Tensor, factor: Tensor) -> Tensor:
        return cells * factor[:, None, None, :]

"""What the spatial operations of the encoder run on: every cell (:class:`DenseGrid`) or an active set
(:class:`SparseGrid`). Features are channels last: ``[B, H, W, C]`` on a dense grid, ``[N, C]`` on a sparse one.

A network written against :class:`Grid` has one definition for both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_ops import pointwise

GRNScope = Literal["image", "batch"]


GRN_SCOPES: tuple[GRNScope, ...] = ("image", "batch")


class Grid(ABC):
    """The positions of a feature map at one stage, and the operations that need to know them.

    Args:
        grn_scope: whether GRN norms are taken over each image ("image") or over the whole batch ("batch", as the
            official sparse pre-training does).
    """

    def __init__(self, grn_scope: GRNScope = "image") -> None:
        if grn_scope not in GRN_SCOPES:
            raise ValueError(f"grn_scope must be one of {GRN_SCOPES}, got {grn_scope!r}")
        self.grn_scope: GRNScope = grn_scope

    @property
    @abstractmethod
    def batch_size(self) -> int: ...

    @abstractmethod
    def stem(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Non-overlapping patch embedding of ``[B, C, H, W]`` with a weight ``[out, C, k, k]`` and stride k."""

    @abstractmethod
    def depthwise_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Depthwise convolution with a weight ``[C, 1, K, K]``, stride 1, "same" padding."""

    @abstractmethod
    def downsample(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Grid]:
        """2×2 convolution of stride 2 with a weight ``[out, C, 2, 2]``; returns the features and their grid."""

    def native(self) -> Grid:
        """The grid to run a whole network on: itself, unless its backend keeps features in a form of its own.

        Features between :meth:`stem` and :meth:`rows` are then in that form.
        """
        return self

    def rows(self, x: Tensor) -> Tensor:
        """Features of a network in the form that the caller knows."""
        return x

    def pointwise(self, module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a module that treats every cell alike and by itself."""
        return module(x)

    @abstractmethod
    def image_sum(self, x: Tensor) -> Tensor:
        """Sum over the cells of each image: ``[B, C]``."""

    @abstractmethod
    def image_scale(self, x: Tensor, factor: Tensor) -> Tensor:
        """Multiply the cells of image b by ``factor[b]``; ``factor`` is ``[B, C]`` or ``[B, 1]``."""

    def grn(self, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        """Global response normalisation; norms in float32 or wider, output in the dtype of ``x``."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        energy = self.image_sum(wide.square())
        if self.grn_scope == "batch":
            energy = energy.sum(0, keepdim=True).expand_as(energy)
        scale = pointwise.grn_scale(energy, gamma.to(wide.dtype), eps)
        return self.image_scale(x, scale.to(x.dtype)) + beta.to(x.dtype)

    def fuses_mlp(self, x: Tensor) -> bool:
        """Whether :meth:`fused_mlp` serves ``x``."""
        return False

    def fused_mlp(
        self,
        x: Tensor,
        norm: tuple[Tensor, Tensor],
        pwconv1: tuple[Tensor, Tensor],
        grn: tuple[Tensor, Tensor],
        pwconv2: tuple[Tensor, Tensor],
        *,
        norm_eps: float,
        grn_eps: float,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The pointwise half of a block in one piece; arguments as :func:`sparse_ops.functional.convnext_mlp`."""
        raise NotImplementedError(f"{type(self).__name__} has no fused MLP; ask fuses_mlp first")


class DenseGrid(Grid):
    """Every cell of ``[B, H, W, C]``: ordinary dense convolutions."""

    def __init__(self, batch_size: int, grn_scope: GRNScope = "image") -> None:
        super().__init__(grn_scope)
        self._batch_size = batch_size

    @property
    def batch_size(self) -> int:
        return self._batch_size

    def stem(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.conv2d(images.contiguous(memory_format=torch.channels_last), weight, bias, stride=weight.shape[-1])
        return out.permute(0, 2, 3, 1)

    def depthwise_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = weight.shape[-1] // 2
        out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=weight.shape[0])
        return out.permute(0, 2, 3, 1)

    def downsample(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, DenseGrid]:
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2).permute(0, 2, 3, 1), self

    def image_sum(self, x: Tensor) -> Tensor:
        return x.sum((1, 2))

    def image_scale(self, x: Tensor, factor: Tensor) -> Tensor:
        return x * factor[:, None, None, :]

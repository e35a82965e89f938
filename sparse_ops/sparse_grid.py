"""The grid of an active set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_ops import functional
from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend
from sparse_ops.checks import keeps_size, takes_patches
from sparse_ops.grid import MLP, Grid, GRNScope
from sparse_ops.layers import call_in_place_of, conv_weights, mlp_weights
from sparse_ops.pointwise import autocast_dtype, pointwise_linear
from sparse_ops.registry import get_backend, resolve_backend
from sparse_ops.residual import fused_block, groups_of


class SparseGrid(Grid):
    """The cells of an active set, ``[N, C]``, with the depthwise convolution run by a backend.

    Args:
        active: the active set.
        backend: a name, or ``auto`` for the best one that serves what is to be computed.
        grn_scope: see :class:`~sparse_ops.grid.Grid`.

    Raises ValueError if no backend has that name, BackendUnavailableError if the one named cannot run here.
    """

    def __init__(self, active: ActiveSet, backend: str | Backend = "auto", grn_scope: GRNScope = "image") -> None:
        super().__init__(grn_scope)
        self.active = active
        self._choice = backend if isinstance(backend, Backend) or backend == "auto" else get_backend(backend)

    def serving(self, dtype: torch.dtype, kernel_size: int) -> Backend:
        """The backend for features of ``dtype`` and a depthwise convolution of ``kernel_size``."""
        return resolve_backend(self._choice, self.active.device, dtype, kernel_size)

    @property
    def backend(self) -> Backend:
        """The backend named; of ``auto`` the one for float32 and the networks' own kernel size, 7."""
        return self.serving(torch.float32, 7)

    @property
    def batch_size(self) -> int:
        return self.active.batch_size

    def native(self, images: Tensor, kernel_size: int) -> Grid:
        backend = self.serving(autocast_dtype(images.device) or images.dtype, kernel_size)
        return backend.native_grid(self.active, self.grn_scope) or SparseGrid(self.active, backend, self.grn_scope)

    def stem(self, layer: nn.Conv2d, images: Tensor) -> Tensor:
        weight, bias = conv_weights(layer, takes_patches)
        return call_in_place_of(
            layer, lambda images: pointwise_linear(self.active.gather_patches(images), weight, bias), images
        )

    def depthwise(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        weight, bias = conv_weights(layer, keeps_size)
        backend = self.serving(autocast_dtype(x.device) or x.dtype, weight.shape[-1])
        return call_in_place_of(layer, lambda x: functional.depthwise_conv(x, weight, bias, self.active, backend), x)

    def downsample(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        weight, bias = conv_weights(layer, takes_patches)
        # Four consecutive rows are one 2×2 group in the order (0,0), (0,1), (1,0), (1,1): see morton_coordinates.
        return call_in_place_of(
            layer, lambda x: pointwise_linear(x.reshape(-1, 4 * x.shape[1]), weight.permute(0, 2, 3, 1), bias), x
        )

    def down(self) -> SparseGrid:
        return SparseGrid(self.active.down(), self._choice, self.grn_scope)

    def image_sum(self, cells: Tensor) -> Tensor:
        count = self.active.uniform_count
        if count is not None:
            return cells.view(self.batch_size, count, cells.shape[1]).sum(1)
        return cells.new_zeros(self.batch_size, cells.shape[1]).index_add(0, self.active.image_index, cells)

    def image_scale(self, cells: Tensor, factor: Tensor) -> Tensor:
        count = self.active.uniform_count
        if count is not None:
            return (cells.view(self.batch_size, count, cells.shape[1]) * factor[:, None]).view(cells.shape)
        return cells * factor[self.active.image_index]

    def residual(self, x: Tensor, dwconv: nn.Conv2d, mlp: MLP, drop_path: Any, rows: Tensor | None = None) -> Tensor:
        backend = self.serving(autocast_dtype(x.device) or x.dtype, dwconv.kernel_size[0])
        fused = None
        if rows is None:
            fused = fused_block(x, dwconv, mlp, drop_path, self.active, self.grn_scope, backend)
        return super().residual(x, dwconv, mlp, drop_path, rows) if fused is None else fused

    def mlp(self, x: Tensor, layers: MLP, rows: Tensor | None = None) -> Tensor:
        weights = mlp_weights(layers)
        backend = self.serving(x.dtype, 7)
        if weights is None or not backend.fuses_mlp(x.device, x.dtype, weights.w1.dtype):
            return super().mlp(x, layers, rows)
        groups, eps = groups_of(self.active, self.grn_scope), (layers.norm.eps, layers.grn.eps)
        return functional.convnext_mlp(x, weights, groups, backend, eps=eps, rows=rows, workspace=self.active.workspace)

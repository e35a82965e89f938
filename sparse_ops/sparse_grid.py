"""The grid of an active set."""

from __future__ import annotations

from torch import Tensor

from sparse_ops import functional, pointwise
from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend
from sparse_ops.grid import Grid, GRNScope
from sparse_ops.registry import resolve_backend


class SparseGrid(Grid):
    """The cells of an active set, ``[N, C]``, with the depthwise convolution run by a backend.

    Args:
        active: the active set.
        backend: a name, or ``auto`` for the best one available on the device of ``active``.
        grn_scope: see :class:`Grid`.

    Raises:
        ValueError: if no backend has that name.
        BackendUnavailableError: if the backend named cannot run here.
    """

    def __init__(self, active: ActiveSet, backend: str | Backend = "auto", grn_scope: GRNScope = "image") -> None:
        super().__init__(grn_scope)
        self.active = active
        self.backend = resolve_backend(backend, active.device)

    @property
    def batch_size(self) -> int:
        return self.active.batch_size

    def native(self) -> SparseGrid:
        return self.backend.native_grid(self)

    def stem(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return pointwise.pointwise_linear(self.active.gather_patches(images), weight, bias)

    def depthwise_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.depthwise_conv(x, weight, bias, self.active, self.backend)

    def downsample(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, SparseGrid]:
        # Four consecutive rows are one 2×2 group in the order (0,0), (0,1), (1,0), (1,1): see morton_coordinates.
        groups = x.reshape(-1, 4 * x.shape[1])
        weight = weight.permute(0, 2, 3, 1)
        return pointwise.pointwise_linear(groups, weight, bias), self._at(self.active.down())

    def _at(self, active: ActiveSet) -> SparseGrid:
        return SparseGrid(active, self.backend, self.grn_scope)

    def image_sum(self, x: Tensor) -> Tensor:
        count = self.active.uniform_count
        if count is not None:
            return x.view(self.batch_size, count, x.shape[1]).sum(1)
        return x.new_zeros(self.batch_size, x.shape[1]).index_add(0, self.active.image_index, x)

    def image_scale(self, x: Tensor, factor: Tensor) -> Tensor:
        count = self.active.uniform_count
        if count is not None:
            return (x.view(self.batch_size, count, x.shape[1]) * factor[:, None]).view(x.shape)
        return x * factor[self.active.image_index]

    def fuses_mlp(self, x: Tensor) -> bool:
        mixed = pointwise.autocast_dtype(x.device) is not None
        return (self.backend.mixes_dtypes or not mixed) and self.backend.fuses_mlp(x.device, x.dtype)

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
        offsets = self.active.row_offsets
        groups = offsets if self.grn_scope == "image" else offsets[:: offsets.numel() - 1].contiguous()
        return functional.convnext_mlp(
            x,
            norm,
            pwconv1,
            grn,
            pwconv2,
            groups,
            self.backend,
            norm_eps=norm_eps,
            grn_eps=grn_eps,
            rows=rows,
            workspace=self.active.workspace,
        )

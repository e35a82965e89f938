"""MinkowskiEngine: the encoder as the official FCMAE runs it, every layer on its sparse tensors.

Two things are offered. The backend's own contract, depthwise convolutions of rows, takes its neighbours from
MinkowskiEngine's kernel map. And :class:`MinkowskiGrid`, which an encoder gets for this backend, keeps the features of
the whole network in a ``MinkowskiEngine.SparseTensor``, from the stem to the last stage.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend
from sparse_ops.backends.minkowski import layers
from sparse_ops.checks import keeps_size, takes_patches
from sparse_ops.grid import MLP, Grid, GRNScope
from sparse_ops.layers import conv_weights
from sparse_ops.sparse_grid import SparseGrid

REMEDY = "fcmae minkowski builds and installs it"


@cache
def _import_error() -> str | None:
    try:
        layers.minkowski_engine()
    except ModuleNotFoundError as error:
        if error.name == "MinkowskiEngine":
            return "MinkowskiEngine is not installed"
        return f"MinkowskiEngine needs the module {error.name}"
    except (ImportError, OSError) as error:
        return f"MinkowskiEngine does not fit this Python and torch {torch.__version__} ({error})"
    return None


class Coordinates:
    """The coordinate map of an active set: built once for a stage and a batch, kept on the active set.

    All stages of a batch share one ``MinkowskiEngine.CoordinateManager``, which also keeps the kernel maps.
    """

    def __init__(self, active: ActiveSet, manager: Any, key: Any) -> None:
        self.manager, self.key = manager, key
        stride = torch.tensor([1, *key.get_tensor_stride()], device=active.device)
        engine_N3 = manager.get_coordinates(key).to(active.device, torch.int64) // stride
        ours = torch.arange(active.num_cells, device=active.device)
        order = active.densify(ours[:, None], -1)[tuple(engine_N3.unbind(1))].flatten()
        assert order.numel() == ours.numel() and bool((order >= 0).all()), "the coordinate map is of other cells"
        self._same = torch.equal(order, ours)
        self.order = order
        """``[N]`` int64: our row of each of the engine's rows."""
        self.place = torch.argsort(order)
        """``[N]`` int64: the engine's row of each of ours."""
        self.image_index = engine_N3[:, 0]
        """``[N]`` int64: the image of each of the engine's rows."""
        self._tables: dict[int, Tensor] = {}

    @classmethod
    def of(cls, active: ActiveSet) -> Coordinates:
        """Those of ``active``: kept ones, a stage further than kept ones, or new."""
        kept: dict[int, Coordinates] = active.backend_cache.setdefault("minkowski", {})
        if active.side not in kept:
            if (finer := kept.get(active.side * 2)) is None:
                kept[active.side] = cls._insert(active)
            else:
                kept[active.side] = Coordinates(active, finer.manager, finer.manager.stride(finer.key, 2))
        return kept[active.side]

    @classmethod
    def _insert(cls, active: ActiveSet) -> Coordinates:
        engine = layers.minkowski_engine()
        kind = engine.CoordinateMapType.CUDA if active.device.type == "cuda" else engine.CoordinateMapType.CPU
        manager = engine.CoordinateManager(D=2, coordinate_map_type=kind)
        # Batch index first, contiguous, int32: anything else is read wrongly or not at all.
        key, _ = manager.insert_and_map(active.coordinates.to(torch.int32).contiguous(), [1, 1], "")
        return cls(active, manager, key)

    def to_engine(self, rows: Tensor) -> Tensor:
        """Rows ``[N, C]`` in the active set's order, in the engine's."""
        return rows if self._same else rows.index_select(0, self.order)

    def to_rows(self, features: Tensor) -> Tensor:
        """Inverse of :meth:`to_engine`."""
        return features if self._same else features.index_select(0, self.place)

    def table(self, kernel_size: int) -> Tensor:
        """``[N, K²]`` int64: our row under each tap, taps row-major over the kernel, N where there is none."""
        if kernel_size not in self._tables:
            cells = self.order.numel()
            engine_NT = layers.neighbour_table(self.manager, self.key, kernel_size, 1).to(self.order.device)
            ours_NT = torch.cat((self.order, self.order.new_full((1,), cells)))[engine_NT[self.place]]
            by_tap = ours_NT.view(cells, kernel_size, kernel_size).transpose(1, 2)
            self._tables[kernel_size] = by_tap.reshape(cells, -1)
        return self._tables[kernel_size]


class MinkowskiGrid(SparseGrid):
    """A sparse grid whose features are ``MinkowskiEngine.SparseTensor``, between :meth:`stem` and :meth:`plain`.

    Cells are in the engine's order; the active set must not be empty. Computes in float32 or float64; under autocast
    the whole of it is kept in float32.
    """

    def __init__(self, active: ActiveSet, backend: Backend, grn_scope: GRNScope = "image") -> None:
        super().__init__(active, backend, grn_scope)
        self.coordinates = Coordinates.of(active)

    def native(self, images: Tensor, kernel_size: int) -> Grid:
        return self

    def _full_precision(self) -> torch.autocast:
        return torch.autocast(self.active.device.type, enabled=False)

    def stem(self, layer: nn.Conv2d, images: Tensor) -> Any:
        rows = super().stem(layer, images)
        if torch.is_autocast_enabled(rows.device.type):
            rows = rows.float()
        layers.check_dtype(rows.dtype)
        engine, place = layers.minkowski_engine(), self.coordinates
        features = place.to_engine(rows)
        return engine.SparseTensor(features, coordinate_map_key=place.key, coordinate_manager=place.manager)

    def plain(self, x: Any) -> Tensor:
        return self.coordinates.to_rows(x.F)

    def pointwise(self, layer: Callable[[Tensor], Tensor], x: Any) -> Any:
        with self._full_precision():
            return layers.with_features(x, layer(x.F))

    def depthwise(self, layer: nn.Conv2d, x: Any) -> Any:
        weight, bias = conv_weights(layer, keeps_size)
        with self._full_precision():
            return layers.depthwise_conv(x, weight.transpose(2, 3).flatten(1).t(), bias, weight.shape[-1])

    def downsample(self, layer: nn.Conv2d, x: Any) -> Any:
        weight, bias = conv_weights(layer, takes_patches)
        with self._full_precision():
            kernel = weight.transpose(2, 3).flatten(2).permute(2, 1, 0)
            return layers.strided_conv(x, kernel, bias, 2, self.down().coordinates.key)

    def down(self) -> MinkowskiGrid:
        return type(self)(self.active.down(), self.backend, self.grn_scope)

    def image_sum(self, cells: Tensor) -> Tensor:
        return cells.new_zeros(self.batch_size, cells.shape[1]).index_add(0, self.coordinates.image_index, cells)

    def image_scale(self, cells: Tensor, factor: Tensor) -> Tensor:
        return cells * factor.index_select(0, self.coordinates.image_index)

    def mlp(self, x: Any, block: MLP, rows: Tensor | None = None) -> Any:
        """See :meth:`~sparse_ops.grid.Grid.mlp`; ValueError if ``rows`` are asked for: sparse tensors know none."""
        if rows is not None:
            raise ValueError("a network on MinkowskiEngine computes every cell; rows must be None")
        return self.pointwise(lambda cells: Grid.mlp(self, cells, block), x)


class MinkowskiBackend(Backend):
    """Neighbours from MinkowskiEngine's kernel map, sums in torch."""

    name = "minkowski"
    summary = "MinkowskiEngine, every layer of the encoder on its sparse tensors; for parity, float32 and float64"
    priority = -10
    """Below the reference, which is always there: taken only by name."""
    traceable = False

    def unavailable_reason(self) -> str | None:
        error = _import_error()
        return None if error is None else f"{error}; {REMEDY}"

    def rejects(self, device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
        if device.type not in ("cpu", "cuda"):
            return f"device {device.type} is not one of cpu and cuda"
        if dtype not in (torch.float32, torch.float64):
            return f"dtype {dtype} is not one of float32 and float64"
        if device.type == "cuda" and not layers.minkowski_engine().is_cuda_available():
            return "MinkowskiEngine was built for processors; fcmae minkowski --cuda builds it for CUDA"
        return None

    def native_grid(self, active: ActiveSet, grn_scope: GRNScope) -> Grid | None:
        if active.num_cells == 0:
            return None  # MinkowskiEngine has no empty coordinate map, and there is nothing to compute
        return MinkowskiGrid(active, self, grn_scope)

    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, *, reverse_taps: bool
    ) -> Tensor:
        if not active.num_cells:
            return torch.zeros_like(x)
        kernel_TC = weight.flatten(1).t().contiguous()
        table_NT = Coordinates.of(active).table(weight.shape[-1])
        out = layers.sum_taps(x.contiguous(), kernel_TC.flip(0) if reverse_taps else kernel_TC, table_NT)
        return out if bias is None else out + bias

    def depthwise_weight_grad(self, x: Tensor, grad: Tensor, active: ActiveSet, kernel_size: int) -> Tensor:
        kernel_TC = x.new_zeros(kernel_size**2, x.shape[1])
        if active.num_cells:
            table_NT = Coordinates.of(active).table(kernel_size)
            _, grad_kernel = layers.sum_taps_backward(grad, x, kernel_TC, table_NT, (False, True))
            assert grad_kernel is not None
            kernel_TC = grad_kernel
        return kernel_TC.t().reshape(-1, 1, kernel_size, kernel_size)


BACKEND = MinkowskiBackend()

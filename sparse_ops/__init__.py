"""Sparse operations on the visible patches of masked images. Depends on torch alone."""

from sparse_ops.active_set import ActiveSet, morton_coordinates
from sparse_ops.backend import Backend
from sparse_ops.functional import convnext_mlp, depthwise_conv
from sparse_ops.grid import DenseGrid, Grid
from sparse_ops.pointwise import MLPWeights
from sparse_ops.registry import BackendUnavailableError, get_backend, registry, resolve_backend
from sparse_ops.sparse_grid import SparseGrid

# The formatter would give every name a line of its own.
__all__ = [
    "ActiveSet", "Backend", "BackendUnavailableError", "DenseGrid", "Grid", "MLPWeights", "SparseGrid",
    "convnext_mlp", "depthwise_conv", "get_backend", "morton_coordinates", "registry", "resolve_backend",
]  # fmt: skip

"""The backend on MinkowskiEngine."""

from sparse_ops.backends.minkowski.backend import BACKEND

__all__ = ["BACKEND"]

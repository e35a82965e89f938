"""The compiled CPU backend."""

from sparse_ops.backends.cpu.backend import BACKEND

__all__ = ["BACKEND"]

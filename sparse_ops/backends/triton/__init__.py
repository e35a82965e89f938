"""The backend for NVIDIA GPUs."""

from sparse_ops.backends.triton.backend import BACKEND

__all__ = ["BACKEND"]

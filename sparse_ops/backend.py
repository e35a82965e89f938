"""The contract of a backend.

A backend is one module or package in ``sparse_ops/backends`` with a module-level ``BACKEND``. Its third-party imports
happen in :meth:`Backend.unavailable_reason` and in its kernels, never when the module is imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sparse_ops.active_set import ActiveSet
from sparse_ops.grid import Grid, GRNScope
from sparse_ops.map_kernels import MapKernels
from sparse_ops.pointwise import MLPWeights
from sparse_ops.workspace import Workspace


class MLPCall(NamedTuple):
    """The arguments of :meth:`Backend.mlp`. Tensors are contiguous."""

    x: Tensor
    """``[N, C]``."""
    row_offsets: Tensor
    """``[G + 1]`` int64 on the device of ``x``: GRN norms are taken over the rows of each group."""
    rows: Tensor | None
    """``[M]`` int64, distinct: the rows of the result to compute; all of them if None."""
    weights: MLPWeights
    """Of any C and D."""
    eps: tuple[float, float]
    """Added to the variance of the LayerNorm, and to the mean of GRN's norms."""
    workspace: Workspace
    """Memory for temporaries."""


class Backend(ABC):
    """An implementation of the sparse depthwise convolution.

    Rows come and go in the active set's order. Kernels are plain functions of their arguments; autograd is one level
    up, in :mod:`sparse_ops.functional`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    #: ``auto`` takes the highest priority among the backends that are available and accept the device.
    priority: ClassVar[int]
    #: Whether torch.compile can trace a network that runs on it.
    traceable: ClassVar[bool] = True
    #: Kernels for a dense network, whose maps have nothing masked.
    maps: ClassVar[MapKernels | None] = None
    #: Whether the depthwise convolution takes weights and biases of float32 beside features of 16 bits.
    wide_weights: ClassVar[bool] = False

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """None if the backend can run on this machine, else why not and how to get it."""

    @abstractmethod
    def rejects(self, device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
        """None if such inputs are served, else why not."""

    def check(self, device: torch.device) -> str | None:
        """None if results on ``device`` are right, else what is wrong; ``auto`` asks once before taking the backend."""
        return None

    def warm_up(  # noqa: B027  # optional, and nothing by default
        self, stages: Sequence[tuple[int, int]], kernel_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Do ahead of the first step what can be: kernels for ``(side, channels)`` of each stage are compiled, say.

        Args:
            stages: cells a side of a patch, and channels.
            kernel_size: of the depthwise convolution.
            device: where the network will run.
            dtype: of its features; the parameters are float32.
        """

    def prepare(self, active: ActiveSet, kernel_size: int) -> None:  # noqa: B027  # optional, and nothing by default
        """Make the tables of ``active`` that the kernels use, which keeps them; by default there are none.

        Called outside of autograd's function: torch.compile does not let a table made inside of it live on.
        """

    @abstractmethod
    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, *, reverse_taps: bool
    ) -> Tensor:
        """Depthwise convolution over the active cells; masked cells and the outside count as zero.

        Args:
            x: ``[N, C]``, contiguous.
            weight: ``[C, 1, K, K]``, contiguous, of the same dtype.
            bias: ``[C]`` or None.
            reverse_taps: use the taps in reverse order: with ``x`` a gradient, this is the gradient for the input.

        Returns:
            ``[N, C]`` in the dtype of ``x``, accumulated in float32 or wider.
        """

    @abstractmethod
    def depthwise_weight_grad(self, x: Tensor, grad: Tensor, active: ActiveSet, kernel_size: int) -> Tensor:
        """Gradient for the weight, ``[C, 1, K, K]`` in the dtype of ``x``, from ``x`` and ``grad``, both ``[N, C]``."""

    def depthwise_grads(
        self, x: Tensor, grad: Tensor, active: ActiveSet, weight: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The same in the dtype of ``weight``, and the gradient for the bias where one kernel finds both, else None."""
        return self.depthwise_weight_grad(x, grad, active, weight.shape[-1]), None

    def native_grid(self, active: ActiveSet, grn_scope: GRNScope) -> Grid | None:
        """The grid to run a whole network on, for a backend that runs all its layers; None for the ordinary one."""
        return None

    def fuses_mlp(self, device: torch.device, dtype: torch.dtype, weights_dtype: torch.dtype) -> bool:
        """Whether :meth:`mlp` and :meth:`mlp_backward` serve features of ``dtype`` with weights of ``weights_dtype``,
        which is wider under autocast."""
        return False

    def mlp(self, call: MLPCall) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The pointwise half of a block in one piece, from LayerNorm to projection.

        Returns:
            The result, ``[N, C]`` or ``[M, C]``, and the tensors that :meth:`mlp_backward` needs.
        """
        raise NotImplementedError(f"backend {self.name!r} has no fused MLP")

    def mlp_result(self, call: MLPCall, residual: Tensor | None = None) -> Tensor:
        """The result of :meth:`mlp` alone, plus ``residual`` of its shape, where no backward pass follows."""
        out, _ = self.mlp(call)
        return out if residual is None else residual + out

    def mlp_backward(self, grad: Tensor, call: MLPCall, kept: tuple[Tensor, ...]) -> list[Tensor]:
        """Gradients for ``x`` and for the eight weights, from ``grad`` (of the result) and what :meth:`mlp` kept."""
        raise NotImplementedError(f"backend {self.name!r} has no fused MLP")

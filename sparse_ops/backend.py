"""The contract of a backend.

A backend is one module or package in ``sparse_ops/backends`` with a module-level ``BACKEND``. Its third-party imports
happen in :meth:`Backend.unavailable_reason` and in its kernels, never when the module is imported.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sparse_ops.active_set import ActiveSet

if TYPE_CHECKING:
    from sparse_ops.sparse_grid import SparseGrid

logger = logging.getLogger(__name__)


class Backend(ABC):
    """An implementation of the sparse depthwise convolution.

    Rows come and go in the active set's order. Kernels are plain functions of their arguments; autograd is one level
    up, in :mod:`sparse_ops.functional`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    #: ``auto`` takes the highest priority among the backends that are available and accept the device.
    priority: ClassVar[int]
    #: Whether :meth:`mlp` takes parameters in float32 with features of 16 bits, as autocast has them.
    mixes_dtypes: ClassVar[bool] = False

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

    def native_grid(self, grid: SparseGrid) -> SparseGrid:
        """The grid to run a whole network on, for a backend that runs all its layers; by default the one given."""
        return grid

    def fuses_mlp(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the pointwise half of a block runs in one piece for such features.

        Then :meth:`fuses_whole_mlp` accepts every width, or :meth:`gelu_grn` and :meth:`gelu_grn_backward` are there.
        """
        return False

    def gelu_grn(
        self, h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, row_offsets: Tensor, eps: float, out: Tensor
    ) -> Tensor:
        """GRN of the GELU of ``h + bias`` (ConvNeXt V2, eq. 1-3).

        Args:
            h: ``[N, D]``, contiguous. bias, gamma, beta: ``[D]``.
            row_offsets: ``[G + 1]`` int64 on the device of ``h``: norms are taken over the rows of each group.
            out: ``[N, D]``, receives the result.

        Returns:
            The channel norms ``[G, D]``.
        """
        raise NotImplementedError(f"backend {self.name!r} has no fused GELU + GRN")

    def gelu_grn_backward(
        self,
        grad: Tensor,
        h: Tensor,
        bias: Tensor,
        gamma: Tensor,
        beta: Tensor,
        norms: Tensor,
        row_offsets: Tensor,
        eps: float,
        out: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Backward of :meth:`gelu_grn`, which also recomputes its output so that it need not be kept.

        Args:
            grad: ``[N, D]``, the gradient for the output; overwritten with the gradient for ``h``.
            h, bias, gamma, beta, norms, row_offsets, eps: as forward.
            out: ``[N, D]``, receives the output of the forward pass again.

        Returns:
            ``(grad_gamma, grad_beta, gradient for h summed over the rows)``, each ``[D]``.
        """
        raise NotImplementedError(f"backend {self.name!r} has no fused GELU + GRN")

    def fuses_whole_mlp(self, channels: int, some_rows: bool) -> bool:
        """Whether :meth:`mlp` takes that width, and ``rows`` if there are some; it is then preferred.

        Asked only for inputs that :meth:`fuses_mlp` accepts.
        """
        return False

    def mlp(
        self,
        x: Tensor,
        parameters: tuple[Tensor, ...],
        row_offsets: Tensor,
        rows: Tensor | None,
        norm_eps: float,
        grn_eps: float,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The pointwise half of a block, from LayerNorm to projection.

        Args:
            x: ``[N, C]``, contiguous.
            parameters: LayerNorm's weight and bias ``[C]``, w1 ``[D, C]``, b1 ``[D]``, gamma and beta ``[D]``,
                w2 ``[C, D]``, b2 ``[C]``.
            row_offsets: ``[G + 1]`` int64 on the device of ``x``: norms are taken over the rows of each group.
            rows: ``[M]`` int64, distinct: the rows of the result to compute; all of them if None.
            norm_eps, grn_eps: added to the variance, and to the mean of the norms.

        Returns:
            The result, ``[N, C]`` or ``[M, C]``, and the tensors that :meth:`mlp_backward` needs.
        """
        raise NotImplementedError(f"backend {self.name!r} has no fused MLP")

    def mlp_backward(
        self,
        grad: Tensor,
        x: Tensor,
        parameters: tuple[Tensor, ...],
        row_offsets: Tensor,
        rows: Tensor | None,
        kept: tuple[Tensor, ...],
        norm_eps: float,
        grn_eps: float,
    ) -> list[Tensor]:
        """Gradients for ``x`` and each of ``parameters``, from ``grad`` (of the result) and what :meth:`mlp` kept."""
        raise NotImplementedError(f"backend {self.name!r} has no fused MLP")

    def layer_norm_backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Backward of LayerNorm over the channels, which also recomputes its output.

        Args:
            grad, x: ``[N, C]``, the gradient for the output and the input, contiguous.
            mean, rstd: ``[N, 1]``, from the forward pass.
            weight, bias: ``[C]``.
            out: ``[N, C]``, receives the output of the forward pass again.

        Returns:
            ``(grad_x, grad_weight, grad_bias)``.
        """
        normed = (x - mean) * rstd
        torch.addcmul(bias, normed, weight, out=out)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad, x, [x.shape[1]], mean, rstd, weight, bias, [True, True, True]
        )
        return grad_x, grad_weight, grad_bias

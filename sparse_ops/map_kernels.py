"""The contract of kernels for whole maps: what a backend may have for a network with nothing masked."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class MapKernels(ABC):
    """Operations on maps ``[B, H, W, C]``, contiguous, of any height and width; outside of a map is zero."""

    @abstractmethod
    def rejects(self, device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
        """None if such maps are served, else why not; ``kernel_size`` is that of the depthwise convolution."""

    @abstractmethod
    def depthwise(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, reverse_taps: bool) -> Tensor:
        """Depthwise convolution, stride 1 and "same" padding, in the dtype of ``x``, accumulated in float32 or wider.

        Args:
            x: ``[B, H, W, C]``.
            weight: ``[C, 1, K, K]``, contiguous.
            bias: ``[C]`` or None.
            reverse_taps: use the taps in reverse order: with ``x`` a gradient, this is the gradient for the input.
        """

    @abstractmethod
    def depthwise_weight_grad(self, x: Tensor, grad: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
        """Gradients for weight ``[C, 1, K, K]`` and bias ``[C]`` from ``x`` and ``grad``, both ``[B, H, W, C]``."""

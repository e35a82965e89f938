"""The readable backend: plain torch, any dtype, any device. What the fast ones are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend
from sparse_ops.pointwise import wide_dtype


def _with_zero_row(x_NC: Tensor) -> Tensor:
    """Append the row that index N of the neighbour table points to."""
    return torch.cat((x_NC, x_NC.new_zeros(1, x_NC.shape[1])))


class ReferenceBackend(Backend):
    """One gather and one multiply-add a tap, from a neighbour table over cells."""

    name = "reference"
    summary = "plain torch, any device and dtype"
    priority = 0

    def unavailable_reason(self) -> str | None:
        return None

    def rejects(self, device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
        return None if dtype.is_floating_point else f"dtype {dtype} is not a floating-point type"

    def prepare(self, active: ActiveSet, kernel_size: int) -> None:
        active.cell_neighbours(kernel_size)

    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, *, reverse_taps: bool
    ) -> Tensor:
        nbr_NK = active.cell_neighbours(weight.shape[-1])
        wide = wide_dtype(x.dtype)
        padded = _with_zero_row(x.to(wide))
        taps_KC = weight.to(wide).flatten(1).t()
        if reverse_taps:
            taps_KC = taps_KC.flip(0)
        out = x.new_zeros(x.shape, dtype=wide) if bias is None else bias.to(wide).expand(x.shape).clone()
        for k, tap_C in enumerate(taps_KC):
            out.addcmul_(padded[nbr_NK[:, k]], tap_C)
        # A copy: torch.compile (2.11) loses the gradient of a tensor changed in place, or cast to its own dtype.
        return out.to(x.dtype, copy=True)

    def depthwise_weight_grad(self, x: Tensor, grad: Tensor, active: ActiveSet, kernel_size: int) -> Tensor:
        nbr_NK = active.cell_neighbours(kernel_size)
        wide = wide_dtype(x.dtype)
        padded, grad = _with_zero_row(x.to(wide)), grad.to(wide)
        taps = [(padded[nbr_NK[:, k]] * grad).sum(0) for k in range(kernel_size**2)]
        return torch.stack(taps, dim=1).view(-1, 1, kernel_size, kernel_size).to(x.dtype)


BACKEND = ReferenceBackend()

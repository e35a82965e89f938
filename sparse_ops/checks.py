"""What layers and arguments must be for a kernel to compute with them: it sees weights and rows, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_ops.backend import Backend
from sparse_ops.pointwise import MLPWeights


def keeps_size(layer: nn.Conv2d, weight: Tensor) -> bool:
    """Whether a convolution is depthwise, of stride 1 and "same" padding with zeros."""
    height, width = weight.shape[-2:]
    return (
        (layer.groups, weight.shape[1]) == (weight.shape[0], 1)
        and (layer.stride, layer.dilation, layer.padding_mode) == ((1, 1), (1, 1), "zeros")
        and layer.padding in ((height // 2, width // 2), "same")
    )


def takes_patches(layer: nn.Conv2d, weight: Tensor) -> bool:
    """Whether a convolution takes patches that lie side by side, its stride being its kernel size, of all channels."""
    return (
        (layer.groups, layer.dilation) == (1, (1, 1))
        and layer.stride == tuple(weight.shape[-2:])
        and layer.padding in ((0, 0), "valid")
    )


def check_mlp(x: Tensor, weights: MLPWeights, row_offsets: Tensor, backend: Backend) -> None:
    """Raise ValueError unless the shapes fit, the backend serves such rows and weights, and the offsets divide the rows
    into groups. A backend that fuses none at all says so itself.
    """
    channels, first = x.shape[-1], weights.w1
    expected = MLPWeights.shapes(channels, first.shape[0])
    shapes = [tuple(tensor.shape) for tensor in weights]
    if x.dim() != 2 or shapes != expected:
        raise ValueError(
            f"expected x [N, C] and weights {expected} for C={channels}, got {tuple(x.shape)} and {shapes}"
        )
    if type(backend).mlp is Backend.mlp:
        return
    if any((tensor.device, tensor.dtype) != (first.device, first.dtype) for tensor in weights):
        found = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in weights)
        raise ValueError(f"expected weights of one dtype on one device, got {found}")
    devices = {first.device, row_offsets.device}
    if devices != {x.device} or not backend.fuses_mlp(x.device, x.dtype, first.dtype):
        found = f"{x.dtype} on {x.device} with weights {first.dtype} on {first.device}"
        raise ValueError(f"backend {backend.name!r} fuses no MLP of {found}, row_offsets on {row_offsets.device}")
    if row_offsets.dtype != torch.int64 or row_offsets.dim() != 1 or not row_offsets.numel():
        raise ValueError(f"expected row_offsets [G + 1] int64, got {tuple(row_offsets.shape)} {row_offsets.dtype}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look at them would wait
        offsets = row_offsets.tolist()
        if (offsets[0], offsets[-1]) != (0, len(x)) or offsets != sorted(offsets):
            raise ValueError(f"expected row_offsets that rise from 0 to {len(x)}, got {offsets}")

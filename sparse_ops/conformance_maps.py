"""The check of kernels for whole maps against dense convolutions in float64; see :mod:`sparse_ops.conformance`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparse_ops.map_kernels import MapKernels

MAP_SHAPES = ((1, 1, 1, 17), (2, 7, 7, 3), (2, 13, 29, 40), (1, 30, 61, 5), (1, 2, 90, 24))
"""``[B, H, W, C]``: single cells, maps smaller than the kernel, and widths of every remainder."""
EPS = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3}


def check_map_conformance(maps: MapKernels, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Compare convolution, input gradient, and gradients of weight and bias, of 7 × 7 taps, on the processor.

    An error may be :data:`EPS` of the largest number of a tensor.

    Raises:
        AssertionError: naming what is further off.
    """
    draw = torch.Generator().manual_seed(sum(shape))
    x, grad = (torch.randn(shape, generator=draw).to(dtype) for _ in range(2))
    channels = shape[-1]
    weight = torch.randn(channels, 1, 7, 7, generator=draw).to(dtype)
    bias = torch.randn(channels, generator=draw).to(dtype)
    wide = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    out = F.conv2d(wide[0].permute(0, 3, 1, 2), wide[1], wide[2], padding=3, groups=channels).permute(0, 2, 3, 1)
    expected = out.detach(), *torch.autograd.grad(out, wide, grad.double())
    found = (
        maps.depthwise(x, weight, bias, reverse_taps=False),
        maps.depthwise(grad, weight, None, reverse_taps=True),
        *maps.depthwise_weight_grad(x, grad, 7),
    )
    for name, ours, theirs in zip(
        ("output", "grad of x", "grad of weight", "grad of bias"), found, expected, strict=True
    ):
        error = ((ours.double() - theirs).abs().max() / theirs.abs().max()).item()
        if not error <= EPS[dtype]:
            raise AssertionError(f"map {shape}, {dtype}: error of {name} is {error:.1e}, allowed {EPS[dtype]:.0e}")

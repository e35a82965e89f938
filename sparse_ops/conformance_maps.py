"""The checks of what a dense network runs on against torch in float64; see :mod:`sparse_ops.conformance`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparse_ops.backend import Backend, MLPCall
from sparse_ops.conformance_cases import MLPCase
from sparse_ops.map_kernels import MapKernels
from sparse_ops.oracle import plain_mlp
from sparse_ops.pointwise import MLPWeights
from sparse_ops.workspace import Workspace

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


RESULT_CASES = (
    MLPCase("one row", (1,)),
    MLPCase("rows of every remainder", (15, 16, 17, 31, 33, 47, 48, 49)),
    MLPCase("an image without rows", (20, 0, 5)),
    MLPCase("norms over the batch", (7, 30), scope="batch"),
    MLPCase("odd channels", (50, 3), channels=5),
    MLPCase("one channel", (40,), channels=1),
    MLPCase("maps", (196, 196), channels=40),
    MLPCase("a dead channel", (49,), channels=16, dead_channel=True),
    MLPCase("tails of GELU", (49,), channels=16, tails=True),
    MLPCase("wide", (49,), channels=320),
)


def result_call(case: MLPCase, dtype: torch.dtype) -> MLPCall:
    """The pointwise half of a block, for :meth:`sparse_ops.backend.Backend.mlp_result`."""
    values = case.values(dtype)
    features, _ = values.pop("x"), values.pop("grad")
    return MLPCall(features, case.row_offsets, None, MLPWeights(**values), (1e-6, 1e-6), Workspace())


def check_result_conformance(backend: Backend, case: MLPCase, dtype: torch.dtype) -> None:
    """Compare the pointwise half of a block without a backward pass, on the processor.

    An error may be twice that of torch's operators in ``dtype``, and 4 eps of the largest number; in float64, which
    the oracle is rounded to itself, 64 eps. Added to an input of the block it is the same to the bit.

    Raises:
        AssertionError: saying how far off it is.
    """
    call = result_call(case, dtype)
    exact = plain_mlp(call.x.double(), MLPWeights(*(tensor.double() for tensor in call.weights)), call.row_offsets)
    floor = (64 if dtype is torch.float64 else 4) * torch.finfo(dtype).eps * exact.abs().max()
    allowed = 2 * (plain_mlp(call.x, call.weights, call.row_offsets) - exact).abs().max() + floor
    out, before = backend.mlp_result(call), torch.ones_like(call.x)
    error = (out - exact).abs().max()
    if not error <= allowed:
        raise AssertionError(f"result of {case}, {dtype}: off by {error:.1e}, allowed {allowed:.1e}")
    if not torch.equal(backend.mlp_result(call, before), before + out):
        raise AssertionError(f"result of {case}, {dtype}: another one where it is added to a tensor")

"""Run MinkowskiEngine's convolutions, forward and backward, and compare them with torch's: depthwise and strided.

For :mod:`.minkowski`, in a process of its own, so that a crash of the extension is told and not suffered.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 1e-12
"""Largest difference relative to the largest value, in float64; a wrong tap or row gives differences of order 1."""


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest value of ``theirs``; infinite where ``ours`` is not finite."""
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    return error if math.isfinite(error) else math.inf


def to_conv2d(kernel: Tensor, side: int) -> Tensor:
    """``[K², Cin, Cout]`` as ``[Cout, Cin, y, x]``; MinkowskiEngine numbers the taps with the rows fastest."""
    return kernel.permute(2, 1, 0).unflatten(-1, (side, side)).transpose(-1, -2)


def check(device: str) -> dict[str, float]:
    """Largest relative errors, by layer, on ``device``; every cell of a 9×6 map is there, in a shuffled order."""
    import MinkowskiEngine as ME  # noqa: N817  # its own documentation's name

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    rows = torch.cartesian_prod(torch.arange(2), torch.arange(9), torch.arange(6))
    rows = rows[torch.randperm(len(rows), generator=generator)]
    image, y, x = rows.to(device).unbind(1)
    channels, errors = 5, {}
    layers = {
        "depthwise 7×7": ME.MinkowskiChannelwiseConvolution(channels, kernel_size=7, bias=True, dimension=2),
        "strided 2×2": ME.MinkowskiConvolution(channels, 4, kernel_size=2, stride=2, bias=True, dimension=2),
        "strided 3×3": ME.MinkowskiConvolution(channels, 4, kernel_size=3, stride=3, bias=True, dimension=2),
    }
    for name, layer in layers.items():
        layer = layer.double().to(device)
        sparse = normal(len(rows), channels).requires_grad_()
        out = layer(ME.SparseTensor(sparse, rows.int().to(device).contiguous()))
        stride = out.tensor_stride[0]
        cells = tuple(out.C.long().to(device).unbind(1))

        dense = sparse.detach().new_zeros(2, 9, 6, channels).index_put((image, y, x), sparse.detach()).requires_grad_()
        kernel = layer.kernel.detach().clone().requires_grad_()
        depthwise = kernel.dim() == 2
        weight = to_conv2d(kernel[:, None], 7) if depthwise else to_conv2d(kernel, math.isqrt(len(kernel)))
        # An odd kernel is centred on its cell, an even one starts there.
        padding = weight.shape[-1] // 2 if weight.shape[-1] % 2 else 0
        expected = F.conv2d(
            F.pad(dense.permute(0, 3, 1, 2), (0, stride, 0, stride)),
            weight,
            layer.bias.detach().flatten(),
            stride=stride,
            padding=padding,
            groups=channels if depthwise else 1,
        ).permute(0, 2, 3, 1)
        expected = expected[cells[0], cells[1] // stride, cells[2] // stride]

        grad = normal(*out.F.shape)
        ours = torch.autograd.grad(out.F, (sparse, layer.kernel), grad)
        grad_map, grad_kernel = torch.autograd.grad(expected, (dense, kernel), grad)
        theirs = (grad_map[image, y, x], grad_kernel)
        pairs = zip((out.F, *ours), (expected, *theirs), strict=True)
        errors[name] = max(relative_error(a.detach(), b.detach()) for a, b in pairs)
    return errors


def main() -> int:
    """Print the errors; 1 if one is too large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    errors = check(args.device)
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    sys.stdout.write(f"largest relative error on {args.device}, float64, forward and backward: {told}\n")
    return int(max(errors.values()) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())

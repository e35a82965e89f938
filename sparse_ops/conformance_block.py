"""The check of a fused block, residual included, against the dense oracle; see :mod:`sparse_ops.conformance`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_ops.active_set import ActiveSet
from sparse_ops.conformance import Deviation, _compare, _largest, _run
from sparse_ops.conformance_cases import ConformanceCase, MLPCase, in_layout
from sparse_ops.oracle import dense_depthwise, plain_mlp
from sparse_ops.pointwise import MLPWeights
from sparse_ops.residual import BlockBackend, convnext_block, groups_of


def check_block_conformance(
    backend: BlockBackend,
    case: ConformanceCase,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    stream: torch.dtype = torch.float32,
    parameters: torch.dtype = torch.float32,
) -> dict[str, Deviation]:
    """Compare a block computed in ``dtype``, and its eleven gradients, with separate operations in float64.

    Input and result are in ``stream``, the weights in ``parameters``; the plain computation rounds both to ``dtype``
    before the branch. The floor of a tensor is ``8 · eps(dtype) · max|oracle|``, twice that of the pointwise half:
    here are two operations in a row.

    Raises:
        AssertionError: naming the tensors that are further off than the rule allows.
        ValueError: if the backend does not fuse such blocks.
    """
    place = torch.device(device)
    if not backend.fuses_block(place, dtype, stream, parameters):
        raise ValueError(f"backend {backend.name!r} does not fuse blocks for {dtype} and {stream} on {place.type}")
    visible, side = case.visible, case.side
    counts = tuple(int(image.sum()) * side**2 for image in visible)
    of_mlp = MLPCase(case.name, counts, case.channels, seed=case.seed + 1).values(torch.float64)
    values = {**case.values(torch.float64), **{k: v for k, v in of_mlp.items() if k not in ("x", "grad")}}
    values["x"] = values["x"] * 2
    held = {name: stream if name in ("x", "grad") else parameters for name in values}
    values = {name: in_layout(value.to(device, held[name]), case.layout) for name, value in values.items()}
    exact = {name: value.cpu().double() for name, value in values.items()}
    grad, exact_grad = values.pop("grad"), exact.pop("grad")
    active = ActiveSet.from_mask((~visible).to(device, torch.float32), side=side)
    offsets = torch.tensor((0, *counts)).cumsum(0)

    def fused(x: Tensor, weight: Tensor, bias: Tensor, **weights: Tensor) -> Tensor:
        groups = groups_of(active, "image")
        return convnext_block(x, weight, bias, MLPWeights(**weights), active, groups, backend, dtype=dtype)

    def separate(kind: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        h = dense_depthwise(x.to(kind), weight.to(kind), bias.to(kind), visible, side)
        return x + plain_mlp(h, MLPWeights(**{name: value.to(kind) for name, value in weights.items()}), offsets)

    def oracle(x: Tensor, weight: Tensor, bias: Tensor, **weights: Tensor) -> Tensor:
        return separate(torch.float64, x, weight, bias, weights)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, **weights: Tensor) -> Tensor:
        return separate(dtype, x, weight, bias, weights)

    found = _run(oracle, exact, exact_grad)
    floors = {name: 8 * torch.finfo(dtype).eps * _largest(value) for name, value in found.items()}
    what = f"{backend.name}, fused block, {case.name}, {dtype} in {stream}, {place.type}"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return _compare(what, _run(fused, values, grad), _run(plain, values, grad), found, floors)

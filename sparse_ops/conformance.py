"""The checks that every backend must pass, against the dense oracle. For backend authors and for our tests.

Tolerance. The error of a backend against the oracle may be at most twice the error of the plain torch computation in
the same dtype, plus a floor, stated where it is computed. Errors are the largest absolute difference of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparse_ops import functional
from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend
from sparse_ops.conformance_cases import ConformanceCase, MLPCase, in_layout
from sparse_ops.oracle import dense_depthwise, plain_mlp
from sparse_ops.pointwise import MLPWeights, wide_dtype
from sparse_ops.registry import get_backend

_Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Deviation:
    """Largest absolute errors against the oracle of one tensor, and what was allowed."""

    error: float
    plain_error: float
    floor: float
    scale: float

    @property
    def allowed(self) -> float:
        return 2 * self.plain_error + self.floor

    @property
    def relative(self) -> float:
        """The error over the largest absolute value of the oracle."""
        return self.error / self.scale if self.scale else self.error


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _error(x: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference; infinite where ``x`` is not finite."""
    difference = x.detach().cpu().double() - oracle
    return _largest(torch.where(difference.isfinite(), difference, torch.inf))


def _compare(
    what: str, results: _Tensors, plain: _Tensors, oracle: _Tensors, floors: Mapping[str, float]
) -> dict[str, Deviation]:
    found: dict[str, Deviation] = {}
    for name, expected in oracle.items():
        if not bool(expected.isfinite().all()):
            raise AssertionError(f"{what}: the oracle itself is not finite for {name}")
        shape = tuple(results[name].shape)
        if shape != tuple(expected.shape):
            raise AssertionError(f"{what}: {name}: expected shape {tuple(expected.shape)}, got {shape}")
        error, plain_error = _error(results[name], expected), _error(plain[name], expected)
        found[name] = Deviation(error, plain_error, floors[name], _largest(expected))
    wrong = [
        f"{name}: error {d.error:.3g} > 2 × {d.plain_error:.3g} + {d.floor:.3g} (values up to {d.scale:.3g})"
        for name, d in found.items()
        if not d.error <= d.allowed
    ]
    if wrong:
        raise AssertionError(f"{what}: {'; '.join(wrong)}")
    return found


def _reversed(x: Tensor) -> Tensor:
    return x.flip(tuple(range(x.ndim)))


def _run(function: Callable[..., Tensor], leaves: Mapping[str, Tensor | None], grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients of ``function(**leaves)`` for the incoming gradient ``grad``."""
    inputs = {k: v if v is None else v.detach().requires_grad_() for k, v in leaves.items()}
    out = function(**inputs)
    wanted = {k: v for k, v in inputs.items() if v is not None}
    grads = torch.autograd.grad(out, list(wanted.values()), grad)
    return {"output": out.detach(), **{f"grad of {k}": g for k, g in zip(wanted, grads, strict=True)}}


def check_conformance(
    backend: str | Backend,
    case: ConformanceCase,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Deviation]:
    """Compare the depthwise convolution of a backend, and all its gradients, with the oracle.

    The floor of a tensor is ``2 · eps(accumulator) · S + eps(dtype) / 2 · max|oracle|``: S is the largest sum of
    absolute terms (the same operation on absolute values), which bounds what any order of summation rounds, with
    float32 as the accumulator of 16-bit types; the second term is the rounding of the stored result.

    Returns:
        The errors of ``output``, ``grad of x``, ``grad of weight`` and ``grad of bias``.

    Raises:
        AssertionError: naming the tensors that are further off than the rule allows.
        ValueError: if the backend rejects the dtype, device or kernel size.
    """
    backend = get_backend(backend) if isinstance(backend, str) else backend
    visible, side = case.visible, case.side
    values = case.values(dtype, device)
    exact = {name: value.cpu().double() for name, value in values.items()}
    grad, exact_grad = values.pop("grad"), exact.pop("grad")
    leaves: dict[str, Tensor | None] = {"bias": None, **values}
    active = ActiveSet.from_mask((~visible).to(device, torch.float32), side=side)

    sparse = partial(functional.depthwise_conv, active=active, backend=backend)
    dense = partial(dense_depthwise, visible=visible, side=side)
    absolute = {name: value.abs() for name, value in exact.items()}
    oracle = _run(dense, {"bias": None, **exact}, exact_grad)
    terms = _run(dense, {"bias": None, **absolute}, exact_grad.abs())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = _run(dense, leaves, grad)
    accumulator, storage = torch.finfo(wide_dtype(dtype)).eps, torch.finfo(dtype).eps
    floors = {k: 2 * accumulator * _largest(terms[k]) + storage / 2 * _largest(oracle[k]) for k in oracle}
    what = f"{backend.name}, {case.name}, {dtype}, {torch.device(device).type}"
    return _compare(what, _run(sparse, leaves, grad), plain, oracle, floors)


def check_mlp_conformance(
    backend: str | Backend, case: MLPCase, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Deviation]:
    """Compare the fused pointwise half of a block, and its nine gradients, with separate operations in float64.

    The plain computation runs twice, the second time with rows and channels in reverse order, and the larger error
    counts: every sum rounds differently in the two, and in float64, where the first is the oracle itself, only the
    second shows any error. The floor of a tensor is ``4 · eps(dtype) · max|oracle|``.

    Returns:
        The errors of ``output`` and of ``grad of x``, ``norm_weight``, ``norm_bias``, ``w1``, ``b1``, ``gamma``,
        ``beta``, ``w2`` and ``b2``.

    Raises:
        AssertionError: naming the tensors that are further off than the rule allows.
        ValueError: if the backend does not fuse this dtype on this device.
    """
    backend = get_backend(backend) if isinstance(backend, str) else backend
    if not backend.fuses_mlp(torch.device(device), dtype, dtype):
        raise ValueError(f"backend {backend.name!r} does not fuse the MLP for {dtype} on {torch.device(device).type}")
    values = case.values(dtype, device)
    exact = {name: value.cpu().double() for name, value in values.items()}
    grad, exact_grad = values.pop("grad"), exact.pop("grad")
    offsets = case.row_offsets

    def fused(x: Tensor, **weights: Tensor) -> Tensor:
        return functional.convnext_mlp(x, MLPWeights(**weights), in_layout(offsets.to(x.device), case.layout), backend)

    def plain(x: Tensor, offsets: Tensor = offsets, **weights: Tensor) -> Tensor:
        return plain_mlp(x, MLPWeights(**weights), offsets)

    oracle, ordinary = _run(plain, exact, exact_grad), _run(plain, values, grad)
    turned = {name: _reversed(value) for name, value in values.items()}
    reverse = _run(partial(plain, offsets=(offsets[-1] - offsets).flip(0)), turned, _reversed(grad))
    for name, value in reverse.items():
        ordinary[name] = max(ordinary[name], _reversed(value), key=partial(_error, oracle=oracle[name]))
    floors = {name: 4 * torch.finfo(dtype).eps * _largest(value) for name, value in oracle.items()}
    what = f"{backend.name}, fused MLP, {case.name}, {dtype}, {torch.device(device).type}"
    return _compare(what, _run(fused, values, grad), ordinary, oracle, floors)

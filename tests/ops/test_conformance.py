"""Every registered backend against the oracle, and proof that the conformance suite catches wrong backends."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sparse_ops import ActiveSet, Backend, convnext_mlp, depthwise_conv, get_backend, registry
from sparse_ops.backend import MLPCall
from sparse_ops.backends.triton.launch import interpreting
from sparse_ops.conformance import check_conformance, check_mlp_conformance
from sparse_ops.conformance_block import check_block_conformance
from sparse_ops.conformance_cases import CASES, MLP_CASES, ConformanceCase, MLPCase, random_case
from sparse_ops.oracle import dense_depthwise
from sparse_ops.pointwise import MLPWeights
from sparse_ops.residual import BlockBackend
from sparse_ops.workspace import Workspace

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
AVAILABLE = [name for name, backend in registry().items() if backend.unavailable_reason() is None]


def served(kernel_size: int = 7, dtypes: list[torch.dtype] = DTYPES) -> list[tuple[str, str, torch.dtype]]:
    """(backend, device, dtype) that run here."""
    return [
        (name, device, dtype)
        for name in AVAILABLE
        for device in DEVICES
        for dtype in dtypes
        if registry()[name].rejects(torch.device(device), dtype, kernel_size) is None
    ]


def fused() -> list[tuple[str, str, torch.dtype]]:
    return [
        (name, device, dtype)
        for name, device, dtype in served()
        if registry()[name].fuses_mlp(torch.device(device), dtype, dtype)
    ]


def label(value: object) -> str:
    return str(value).removeprefix("torch.")


def test_reference_is_available_and_accepts_everything():
    assert "reference" in AVAILABLE
    assert ("reference", "cpu", torch.float16) in served(9)


@pytest.mark.parametrize("name", list(registry()))
def test_backend_can_run(name):
    """Skipped, with the reason, for backends that cannot run here, so that the summary of a run shows them."""
    reason = registry()[name].unavailable_reason()
    if reason is not None:
        pytest.skip(f"backend {name} is unavailable: {reason}")
    assert get_backend(name) is registry()[name]


def test_cpu_backend_serves_its_dtypes():
    if "cpu" not in AVAILABLE:
        pytest.skip(str(registry()["cpu"].unavailable_reason()) if "cpu" in registry() else "no cpu backend")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert ("cpu", "cpu", dtype) in served(7)
    assert ("cpu", "cpu", torch.float32) in fused()


@pytest.mark.parametrize(
    ("name", "device", "dtype", "case"),
    [(*where, case) for case in CASES for where in served(case.kernel_size)],
    ids=label,
)
def test_depthwise_conforms(name, device, dtype, case):
    found = check_conformance(name, case, dtype, device)
    assert set(found) == {"output", "grad of x", "grad of weight"} | ({"grad of bias"} if case.bias else set())
    if dtype == torch.float32:
        assert max(d.relative for d in found.values()) < 1e-5


@pytest.mark.parametrize("chunk", range(4))
@pytest.mark.parametrize(("name", "device"), sorted({(name, device) for name, device, _ in served()}))
def test_depthwise_conforms_on_random_cases(name, device, chunk):
    torch.set_num_threads(1 + chunk)
    backend = registry()[name]
    checked = 0
    for seed in range(chunk * 50, chunk * 50 + 50):
        case = random_case(seed)
        dtypes = [d for d in DTYPES[:3] if backend.rejects(torch.device(device), d, case.kernel_size) is None]
        if dtypes:
            check_conformance(backend, case, dtypes[seed % len(dtypes)], device)
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("case", MLP_CASES, ids=str)
@pytest.mark.parametrize(("name", "device", "dtype"), fused(), ids=label)
def test_fused_mlp_conforms(name, device, dtype, case):
    found = check_mlp_conformance(name, case, dtype, device)
    assert len(found) == 10


@pytest.mark.parametrize(("name", "device", "dtype"), served(dtypes=[torch.float64]), ids=label)
def test_gradcheck_depthwise(name, device, dtype):
    case = ConformanceCase("gradcheck", (".#/..", "#./.#"), channels=2, side=2)
    values = case.values(dtype, device)
    active = ActiveSet.from_mask((~case.visible).to(device), side=case.side)
    leaves = [values[k].requires_grad_() for k in ("x", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda *a: depthwise_conv(*a, active, registry()[name]), leaves)


@pytest.mark.parametrize(("name", "device", "dtype"), [f for f in fused() if f[2] == torch.float64], ids=label)
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_gradcheck_fused_mlp(name, device, dtype, scope):
    case = MLPCase("gradcheck", (3, 0, 5), channels=3, scope=scope)
    values = case.values(dtype, device)
    del values["grad"]
    backend = registry()[name]

    def run(x: Tensor, *weights: Tensor):
        return convnext_mlp(x, MLPWeights(*weights), case.row_offsets.to(device), backend)

    assert torch.autograd.gradcheck(run, [v.requires_grad_() for v in values.values()])


@pytest.mark.parametrize(("name", "device", "dtype"), served(), ids=label)
def test_two_runs_are_bit_identical(name, device, dtype):
    case = ConformanceCase("determinism", ("..#./#.#./....", "#.#./...#/##.."), channels=40)
    values = case.values(dtype, device)
    grad = values.pop("grad")
    active = ActiveSet.from_mask((~case.visible).to(device), side=case.side)
    runs = []
    torch.set_num_threads(2)
    for _ in range(2):
        leaves = [values[k].detach().requires_grad_() for k in ("x", "weight", "bias")]
        out = depthwise_conv(*leaves, active, registry()[name])
        runs.append([out, *torch.autograd.grad(out, leaves, grad)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("name", "device", "dtype"), served(dtypes=[torch.float32]), ids=label)
def test_zero_features_stay_visible(name, device, dtype):
    """A visible cell whose features are all zero still has an output: the bias, and its neighbours' content."""
    case = ConformanceCase("zeros", ("..#/#.#",), channels=8, side=2)
    values = case.values(dtype, device)
    active = ActiveSet.from_mask((~case.visible).to(device), side=2)
    x = torch.zeros_like(values["x"])
    out = depthwise_conv(x, values["weight"], values["bias"], active, registry()[name])
    assert torch.equal(out, values["bias"].expand_as(out))


def test_memory_is_poisoned():
    x = torch.ones(3, 2)
    for fresh in (torch.empty(64, 3), x.new_empty(64, 3), torch.empty_like(x), torch.empty_strided((4, 4), (4, 1))):
        assert fresh.isnan().all()
    assert torch.empty_like(x.to(torch.bfloat16)).isnan().all()


class Correct(type(get_backend("reference"))):
    name = "mutant"

    def fuses_mlp(self, device, dtype, weights_dtype) -> bool:
        return True

    def mlp(self, call):
        return self._mlp(call.x, *call.weights, row_offsets=call.row_offsets), ()

    def mlp_backward(self, grad, call, kept):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (call.x, *call.weights)]
            return list(torch.autograd.grad(self._mlp(*leaves, row_offsets=call.row_offsets), leaves, grad))

    approximate = "none"

    def norm(self, energy: Tensor) -> Tensor:
        return torch.where(energy > 0, torch.where(energy > 0, energy, 1).sqrt(), 0)

    def _mlp(self, x, norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2, *, row_offsets):
        h = torch.nn.functional.layer_norm(x, x.shape[1:], norm_weight, norm_bias, 1e-6) @ w1.t() + b1
        return self._grn(h, gamma, beta, row_offsets, 1e-6) @ w2.t() + b2

    def _grn(self, h, gamma, beta, row_offsets, eps):
        y = torch.nn.functional.gelu(h, approximate=self.approximate)
        groups = y.split(row_offsets.diff().tolist())
        norms = torch.stack([self.norm(group.square().sum(0)) for group in groups])
        scale = 1 + gamma * norms / (norms.mean(-1, keepdim=True) + eps)
        return torch.cat([g * s + beta for g, s in zip(groups, scale, strict=True)])


class TransposedTaps(Correct):
    def depthwise(self, x, weight, bias, active, *, reverse_taps):
        return super().depthwise(x, weight.transpose(2, 3), bias, active, reverse_taps=reverse_taps)


class ReversedTaps(Correct):
    def depthwise(self, x, weight, bias, active, *, reverse_taps):
        return super().depthwise(x, weight, bias, active, reverse_taps=not reverse_taps)


class NeverReversed(Correct):
    def depthwise(self, x, weight, bias, active, *, reverse_taps):
        return super().depthwise(x, weight, bias, active, reverse_taps=False)


class NoNeighbourPatches(Correct):
    def depthwise(self, x, weight, bias, active, *, reverse_taps):
        rows = active.side**2
        parts = [
            super(NoNeighbourPatches, self).depthwise(
                part, weight, bias, ActiveSet.full(1, (1, 1), active.side), reverse_taps=reverse_taps
            )
            for part in x.split(rows)
        ]
        return torch.cat([x[:0], *parts])


class UnwrittenRow(Correct):
    def depthwise(self, x, weight, bias, active, *, reverse_taps):
        out = torch.empty_like(x)
        out[:-1] = super().depthwise(x, weight, bias, active, reverse_taps=reverse_taps)[:-1]
        return out


class DroppedBias(Correct):
    def depthwise(self, x, weight, bias, active, *, reverse_taps):
        return super().depthwise(x, weight, None, active, reverse_taps=reverse_taps)


class WrongWeightGrad(Correct):
    def depthwise_weight_grad(self, x, grad, active, kernel_size):
        return super().depthwise_weight_grad(x, grad, active, kernel_size).transpose(2, 3)


class HalfPrecision(Correct):
    def depthwise(self, x, weight, bias, active, *, reverse_taps):
        return super().depthwise(x.bfloat16().to(x.dtype), weight, bias, active, reverse_taps=reverse_taps)


class LostRow(Correct):
    """About what a reduction loses that skips one row."""

    def depthwise_weight_grad(self, x, grad, active, kernel_size):
        return super().depthwise_weight_grad(x, grad, active, kernel_size) * (active.num_cells / (active.num_cells + 1))


@pytest.mark.parametrize(
    "mutant",
    [
        TransposedTaps,
        ReversedTaps,
        NeverReversed,
        NoNeighbourPatches,
        UnwrittenRow,
        DroppedBias,
        WrongWeightGrad,
        HalfPrecision,
        LostRow,
    ],
)
def test_depthwise_conformance_catches(mutant):
    case = next(case for case in CASES if case.name == "C=13")
    check_conformance(Correct(), case)
    with pytest.raises(AssertionError, match=r"mutant, C=13, torch.float32, cpu: .*error"):
        check_conformance(mutant(), case)


class TanhGELU(Correct):
    approximate = "tanh"


class UnsafeNorm(Correct):
    def norm(self, energy: Tensor) -> Tensor:
        return energy.sqrt()


class BatchNorms(Correct):
    def _grn(self, h, gamma, beta, row_offsets, eps):
        return super()._grn(h, gamma, beta, row_offsets[[0, -1]], eps)


class NoBeta(Correct):
    def _grn(self, h, gamma, beta, row_offsets, eps):
        return super()._grn(h, gamma, beta * 0, row_offsets, eps)


@pytest.mark.parametrize(
    ("mutant", "case"),
    [(TanhGELU, "ragged"), (UnsafeNorm, "dead channel"), (BatchNorms, "uniform"), (NoBeta, "one image")],
)
def test_mlp_conformance_catches(mutant, case):
    case = next(c for c in MLP_CASES if c.name == case)
    check_mlp_conformance(Correct(), case)
    with pytest.raises(AssertionError, match="mutant, fused MLP"):
        check_mlp_conformance(mutant(), case)


def test_mlp_conformance_refuses_backends_that_do_not_fuse():
    with pytest.raises(ValueError, match="does not fuse"):
        check_mlp_conformance("reference", MLP_CASES[0])


def test_oracle_equals_a_sum_written_out():
    visible = torch.tensor([[[True, False, True]]])
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.arange(25.0, dtype=torch.float64).view(1, 1, 5, 5)
    out = dense_depthwise(x, weight, torch.tensor([100.0], dtype=torch.float64), visible, side=1)
    centre = 12
    assert out.flatten().tolist() == [100 + centre + 2 * (centre + 2), 100 + 2 * centre + (centre - 2)]
    out.sum().backward()
    assert x.grad.flatten().tolist() == [centre + centre - 2, centre + centre + 2]


class Recorder(TorchDispatchMode):
    """Collects the calls of operators in the ``sparse_ops`` namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparse_ops":
            # Operators have no gradients of their own, and opcheck would ask for them.
            given = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
            self.calls.setdefault(func._schema.name, []).append((func, *given))
        return func(*args, **(kwargs or {}))


def run_every_kernel(backend: Backend, device: str) -> None:
    case = ConformanceCase("opcheck", ("..#/#.#",), channels=5, side=2)
    active = ActiveSet.from_mask((~case.visible).to(device), side=2)
    values = case.values(torch.float32, device)
    x, weight, grad = values["x"], values["weight"], values["grad"]
    backend.depthwise(x, weight, values["bias"], active, reverse_taps=False)
    backend.depthwise(x, weight, None, active, reverse_taps=True)
    backend.depthwise_weight_grad(x, grad, active, 7)
    if backend.maps is not None:
        on_maps = torch.randn(2, 5, 9, 5), torch.randn(5, 1, 7, 7)
        backend.maps.depthwise(*on_maps, torch.randn(5), reverse_taps=False)
        backend.maps.depthwise(*on_maps, None, reverse_taps=True)
        backend.maps.depthwise_weight_grad(on_maps[0], on_maps[0], 7)
    if not backend.fuses_mlp(torch.device(device), torch.float32, torch.float32):
        return
    for channels, some_rows in ((8, None), (8, torch.tensor([4, 1], device=device)), (5, None)):
        case = MLPCase("opcheck", (2, 3), channels=channels)
        values = case.values(torch.float32, device)
        features, grad = values.pop("x"), values.pop("grad")
        weights, offsets = MLPWeights(**values), case.row_offsets.to(device)
        call = MLPCall(features, offsets, some_rows, weights, (1e-6, 1e-6), Workspace())
        out, kept = backend.mlp(call)
        torch.testing.assert_close(backend.mlp_result(call), out)
        grad = grad if some_rows is None else grad[some_rows]
        assert out.shape == grad.shape
        backend.mlp_backward(grad, call, kept)
    if isinstance(backend, BlockBackend):
        check_block_conformance(backend, ConformanceCase("opcheck", ("..#/#.#",), channels=5, side=2), device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_registered_operators_pass_opcheck(device):
    backends = [name for name, where, _ in served(dtypes=[torch.float32]) if where == device]
    if interpreting():  # a process for Triton's, beside one for the others
        backends = ["triton"]
    recorder = Recorder()
    with recorder:
        for name in backends:
            run_every_kernel(registry()[name], device)
    registered = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    expected = {name for name in registered if name.startswith(tuple(f"sparse_ops::{name}_" for name in backends))}
    if not expected:
        pytest.skip("no backend here registers operators")
    assert set(recorder.calls) >= expected
    for calls in recorder.calls.values():
        for operator, args, kwargs in calls:
            torch.library.opcheck(operator, args, kwargs)
            assert_strides_are_promised(operator, args, kwargs)


def assert_strides_are_promised(operator, args, kwargs) -> None:
    """torch.compile lays out memory by the fake implementation; opcheck (torch 2.11) looks at shapes alone."""
    real = tree_leaves(operator(*args, **kwargs))
    with FakeTensorMode() as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        promised = tree_leaves(operator(*fakes[0], **fakes[1]))
    for result, promise in zip(real, promised, strict=True):
        if isinstance(result, Tensor):
            assert result.stride() == promise.stride(), operator

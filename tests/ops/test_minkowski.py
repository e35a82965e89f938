"""MinkowskiEngine itself: our layers on its sparse tensors, its coordinates, and the backend's own traps.

The conformance suite (test_conformance.py) runs for this backend as for every other.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_ops import ActiveSet, BackendUnavailableError, SparseGrid, get_backend, registry
from sparse_ops.backends.minkowski import backend as backend_module
from sparse_ops.backends.minkowski import layers as minkowski
from sparse_ops.backends.minkowski.backend import Coordinates, MinkowskiGrid
from sparse_ops.conformance import check_conformance
from sparse_ops.conformance_cases import CASES
from sparse_ops.oracle import dense_depthwise, visible_from_text

ROOT = Path(__file__).parents[2]
VISIBLE = visible_from_text("..#./#.#.", "####/####", ".#.#/##..")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
needs_minkowski = pytest.mark.minkowski


def active_set(visible: Tensor = VISIBLE, side: int = 4, device: str = "cpu") -> ActiveSet:
    return ActiveSet.from_mask((~visible).to(device), side=side)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sparse_tensor(x: Tensor, active: ActiveSet, order: Tensor):
    """A sparse tensor of the rows in another order, as a user of MinkowskiEngine makes one."""
    engine = minkowski.minkowski_engine()
    return engine.SparseTensor(x[order], active.coordinates[order].int().contiguous())


def rows_of(sparse, active: ActiveSet) -> Tensor:
    """The features of a sparse tensor in the active set's order, found by their coordinates."""
    stride = torch.tensor([1, *sparse.tensor_stride])
    found = [tuple(row) for row in (sparse.C.cpu().long() // stride).tolist()]
    place = {row: index for index, row in enumerate(found)}
    return sparse.F[[place[tuple(row)] for row in active.coordinates.tolist()]]


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def taps(weight: Tensor) -> Tensor:
    """``[C, 1, K, K]`` in the official layout ``[K², C]``: x is the slow axis."""
    return weight[:, 0].transpose(1, 2).flatten(1).t().contiguous()


@needs_minkowski
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_depthwise_layer_against_the_oracle_in_a_shuffled_order(kernel_size, dtype, tolerance, device):
    active, channels = active_set(device=device), 5
    order = torch.randperm(active.num_cells)
    layer = minkowski.MinkowskiDepthwiseConvolution(channels, kernel_size, bias=True, dimension=2)
    weight, bias = normal(channels, 1, kernel_size, kernel_size), normal(channels, seed=1)
    layer = layer.to(device, dtype)
    layer.load_state_dict({"kernel": taps(weight), "bias": bias[None]})
    x, grad = normal(active.num_cells, channels, seed=2), normal(active.num_cells, channels, seed=3)

    ours = x.to(device, dtype).requires_grad_()
    out = rows_of(layer(sparse_tensor(ours, active, order.to(device))), active)
    found = [out, *torch.autograd.grad(out, [ours, layer.kernel, layer.bias], grad.to(device, dtype))]
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    oracle = dense_depthwise(*leaves, VISIBLE, side=4)
    expected = [oracle, *torch.autograd.grad(oracle, leaves, grad)]
    expected[2], expected[3] = taps(expected[2]), expected[3][None]
    errors = [relative_error(a.detach().cpu(), b.detach()) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < tolerance, errors


@needs_minkowski
def test_depthwise_layer_computes_what_the_stock_one_does():
    engine = minkowski.minkowski_engine()
    active, channels = active_set(), 6
    stock = engine.MinkowskiChannelwiseConvolution(channels, kernel_size=7, bias=True, dimension=2).double()
    ours = minkowski.MinkowskiDepthwiseConvolution(channels, kernel_size=7, bias=True, dimension=2).double()
    ours.load_state_dict(stock.state_dict())
    x, grad = normal(active.num_cells, channels).requires_grad_(), normal(active.num_cells, channels, seed=1)
    order = torch.randperm(active.num_cells)
    results = []
    for layer in (stock, ours):
        out = layer(sparse_tensor(x, active, order)).F
        results.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a.detach(), b.detach()) < 1e-13


@needs_minkowski
def test_gradients_of_the_layers_by_finite_differences():
    visible = visible_from_text("..", "#.")
    active = active_set(visible, side=2)
    order = torch.randperm(active.num_cells)
    x = normal(active.num_cells, 2).requires_grad_()
    kernel, bias, gamma, beta = (normal(*shape, seed=3).requires_grad_() for shape in ((9, 2), (1, 2), (1, 2), (1, 2)))

    def depthwise(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        return minkowski.depthwise_conv(sparse_tensor(x, active, order), kernel, bias, 3).F

    assert torch.autograd.gradcheck(depthwise, (x, kernel, bias))
    for scope in ("image", "batch"):

        def grn(x: Tensor, gamma: Tensor, beta: Tensor, scope: str = scope) -> Tensor:
            return minkowski.grn(sparse_tensor(x, active, order), gamma, beta, scope).F

        assert torch.autograd.gradcheck(grn, (x, gamma, beta))

    def strided(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        sparse = sparse_tensor(x, active, order)
        key = sparse.coordinate_manager.stride(sparse.coordinate_map_key, 2)
        return minkowski.strided_conv(sparse, kernel, bias, 2, key).F

    assert torch.autograd.gradcheck(strided, (x, normal(4, 2, 3, seed=4).requires_grad_(), normal(3).requires_grad_()))


@needs_minkowski
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_grn_layer_against_sums_written_out(scope):
    active = active_set()
    layer = minkowski.MinkowskiGRN(3, scope).double()
    torch.nn.init.normal_(layer.gamma)
    torch.nn.init.normal_(layer.beta)
    x = normal(active.num_cells, 3)
    out = rows_of(layer(sparse_tensor(x, active, torch.randperm(active.num_cells))), active)
    groups = (
        [torch.ones(active.num_cells, dtype=torch.bool)]
        if scope == "batch"
        else [active.image_index == b for b in (0, 2)]
    )
    expected = torch.empty_like(x)
    for rows in groups:
        norm = x[rows].square().sum(0).sqrt()
        expected[rows] = layer.gamma * (x[rows] * norm / (norm.mean() + 1e-6)) + layer.beta + x[rows]
    assert torch.allclose(out, expected, rtol=1e-12)


@needs_minkowski
def test_layer_norm_has_the_official_parameters():
    active = active_set()
    layer = minkowski.MinkowskiLayerNorm(3).double()
    assert list(layer.state_dict()) == ["ln.weight", "ln.bias"]
    layer.load_state_dict({"ln.weight": normal(3), "ln.bias": normal(3, seed=1)})
    x = normal(active.num_cells, 3)
    out = rows_of(layer(sparse_tensor(x, active, torch.randperm(active.num_cells))), active)
    assert torch.allclose(out, F.layer_norm(x, (3,), normal(3), normal(3, seed=1), 1e-6), rtol=1e-12)


@needs_minkowski
def test_drop_path_drops_whole_images_and_keeps_the_expectation():
    active = active_set(torch.ones(64, 1, 1, dtype=torch.bool), side=1)
    layer = minkowski.MinkowskiDropPath(0.25)
    x = torch.ones(64, 3)
    sparse = sparse_tensor(x, active, torch.randperm(64))
    factors = rows_of(layer(sparse), active)
    assert (factors == factors[:, :1]).all()
    assert factors.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert 6 <= (factors[:, 0] == 0).sum() <= 28  # 16 ± 3.5 standard deviations
    assert layer.eval()(sparse) is sparse
    unscaled = minkowski.MinkowskiDropPath(0.25, scale_by_keep=False)
    assert set(unscaled(sparse).F.unique().tolist()) == {0.0, 1.0}


@needs_minkowski
def test_a_dead_channel_has_gradient_zero():
    active = active_set()
    x = torch.zeros(active.num_cells, 3, dtype=torch.float64, requires_grad=True)
    layer = minkowski.MinkowskiGRN(3, "image").double()
    torch.nn.init.ones_(layer.gamma)
    layer(sparse_tensor(x, active, torch.arange(active.num_cells))).F.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_layers_refuse_what_they_cannot_compute():
    layer = minkowski.MinkowskiDepthwiseConvolution
    with pytest.raises(ValueError, match="stride 1, got 2"):
        layer(4, kernel_size=3, stride=2, dimension=2)
    with pytest.raises(ValueError, match="must be odd, got 4"):
        layer(4, kernel_size=4, dimension=2)
    with pytest.raises(ValueError, match="dimension must be given"):
        layer(4, kernel_size=3)
    with pytest.raises(ValueError, match="scope must be one of"):
        minkowski.MinkowskiGRN(4, "device")


@needs_minkowski
def test_layers_refuse_features_that_do_not_fit():
    active = active_set()
    order = torch.arange(active.num_cells)
    layer = minkowski.MinkowskiDepthwiseConvolution(4, kernel_size=3, dimension=2)
    with pytest.raises(ValueError, match=r"expected a kernel \[9, 5\].*got \[9, 4\]"):
        layer(sparse_tensor(torch.zeros(active.num_cells, 5), active, order))
    with pytest.raises(TypeError, match=r"computes in float32 and float64, got torch\.bfloat16"):
        layer(sparse_tensor(torch.zeros(active.num_cells, 4, dtype=torch.bfloat16), active, order))
    volume = minkowski.MinkowskiDepthwiseConvolution(4, kernel_size=3, dimension=3)
    with pytest.raises(ValueError, match="expected 3 spatial dimensions, the sparse tensor has 2"):
        volume(sparse_tensor(torch.zeros(active.num_cells, 4), active, order))


@needs_minkowski
def test_code_for_the_official_fcmae_finds_its_imports(monkeypatch):
    engine = minkowski.minkowski_engine()
    for layer in minkowski.OFFICIAL_LAYERS:
        monkeypatch.delattr(engine, layer.__name__, raising=False)
    assert len(minkowski.provide_official_names()) == 4
    scope: dict = {}
    exec(
        "from MinkowskiEngine import MinkowskiConvolution, MinkowskiDepthwiseConvolution, MinkowskiGELU\n"
        "from MinkowskiEngine import MinkowskiDropPath, MinkowskiGRN, MinkowskiLayerNorm, MinkowskiLinear\n"
        "layer = MinkowskiDepthwiseConvolution(8, kernel_size=7, bias=True, dimension=2)",
        scope,
    )
    assert {name: tuple(p.shape) for name, p in scope["layer"].named_parameters()} == {
        "kernel": (49, 8),
        "bias": (1, 8),
    }
    assert minkowski.provide_official_names() == ()
    monkeypatch.setattr(engine, "MinkowskiGRN", str)
    minkowski.provide_official_names()
    assert engine.MinkowskiGRN is str


class Shuffled(Coordinates):
    """Hands its cells to MinkowskiEngine in a random order, so that its rows are not ours."""

    @classmethod
    def _insert(cls, active):
        engine = minkowski.minkowski_engine()
        manager = engine.CoordinateManager(D=2, coordinate_map_type=engine.CoordinateMapType.CPU)
        order = torch.randperm(active.num_cells)
        key, _ = manager.insert_and_map(active.coordinates[order].int().contiguous(), [1, 1], "")
        found = cls(active, manager, key)
        assert active.num_cells < 2 or not found._same
        return found


@needs_minkowski
@pytest.mark.parametrize("case", [c for c in CASES if "visible" not in c.name or "ragged" in c.name], ids=str)
def test_rows_return_in_our_order_whatever_the_engines_is(case, monkeypatch):
    monkeypatch.setattr(backend_module, "Coordinates", Shuffled)
    check_conformance("minkowski", case, torch.float64)


@needs_minkowski
def test_a_network_returns_rows_in_our_order_whatever_the_engines_is(monkeypatch):
    from convnextv2 import Encoder, EncoderConfig

    encoder = Encoder(EncoderConfig((1, 1, 1, 1), (4, 8, 8, 12), patch_size=16)).double()
    images = normal(3, 3, 32, 64)
    expected = encoder(images, SparseGrid(active_set(side=8), "reference"))
    monkeypatch.setattr(backend_module, "Coordinates", Shuffled)
    assert torch.allclose(encoder(images, SparseGrid(active_set(side=8), "minkowski")), expected, rtol=1e-10)


@needs_minkowski
def test_maps_are_built_once_a_stage_and_a_batch(monkeypatch):
    from convnextv2 import Encoder, EncoderConfig

    manager_class = minkowski.minkowski_engine().CoordinateManager
    calls = {"insert_and_map": 0, "kernel_map": 0, "stride": 0}
    for name in calls:
        original = getattr(manager_class, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            calls[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(manager_class, name, counted)
    encoder = Encoder(EncoderConfig((3, 2, 3, 2), (4, 8, 8, 12), patch_size=16))
    active = active_set(side=8)
    for _ in range(2):
        encoder(normal(3, 3, 32, 64, dtype=torch.float32), SparseGrid(active, "minkowski")).sum().backward()
    assert calls == {"insert_and_map": 1, "kernel_map": 4, "stride": 3}
    encoder(normal(3, 3, 32, 64, dtype=torch.float32), SparseGrid(active_set(side=8), "minkowski"))
    assert calls == {"insert_and_map": 2, "kernel_map": 8, "stride": 6}


@needs_minkowski
def test_features_of_a_network_are_sparse_tensors_until_its_end(monkeypatch):
    from convnextv2 import Encoder, EncoderConfig
    from convnextv2.models.encoder import Block

    engine = minkowski.minkowski_engine()
    seen = []
    original = Block.forward

    def watched(self, x, grid, rows=None):
        out = original(self, x, grid, rows)
        seen.append((x, out))
        return out

    monkeypatch.setattr(Block, "forward", watched)
    encoder = Encoder(EncoderConfig((1, 1, 1, 1), (4, 8, 8, 12), patch_size=16))
    *_, (rows, grid) = encoder.forward_stages(
        normal(3, 3, 32, 64, dtype=torch.float32), SparseGrid(active_set(side=8), "minkowski")
    )
    assert all(isinstance(x, engine.SparseTensor) for pair in seen for x in pair)
    assert [x.tensor_stride[0] for x, _ in seen] == [1, 2, 4, 8]
    assert isinstance(rows, Tensor)
    assert isinstance(grid, MinkowskiGrid)
    assert grid.active.side == 1


@needs_minkowski
def test_nothing_visible_at_all():
    from convnextv2 import Encoder, EncoderConfig

    encoder = Encoder(EncoderConfig((1, 1, 1, 1), (4, 8, 8, 12), patch_size=16))
    nothing = SparseGrid(active_set(torch.zeros(2, 2, 2, dtype=torch.bool), side=8), "minkowski")
    assert encoder(torch.zeros(2, 3, 32, 32), nothing).shape == (0, 12)


@needs_minkowski
def test_autocast_leaves_the_engine_in_float32():
    from convnextv2 import Encoder, EncoderConfig

    encoder = Encoder(EncoderConfig((1, 1, 1, 1), (4, 8, 8, 12), patch_size=16))
    images = normal(3, 3, 32, 64, dtype=torch.float32)
    exact = encoder(images, SparseGrid(active_set(side=8), "minkowski"))
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(images, SparseGrid(active_set(side=8), "minkowski"))
    assert found.dtype == torch.float32
    # The stem's product is outside of the engine and is rounded to bfloat16, nothing after it is.
    assert relative_error(found.detach(), exact.detach()) < 2e-2
    with pytest.raises(TypeError, match=r"float32 and float64, got torch\.bfloat16"):
        encoder.bfloat16()(images.bfloat16(), SparseGrid(active_set(side=8), "minkowski"))


@needs_minkowski
def test_a_network_on_the_engine_computes_every_cell():
    grid = SparseGrid(active_set(side=8), "minkowski").native(torch.zeros(1), 7)
    with pytest.raises(ValueError, match="rows must be None"):
        grid.mlp(None, None, rows=torch.zeros(1))


@needs_minkowski
@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_memory_does_not_grow_over_many_steps(device):
    """The coordinate and kernel maps of a batch go with it: those of 500 batches, kept, would be some 500 MB."""
    from convnextv2 import Encoder, EncoderConfig

    reason = get_backend("minkowski").rejects(torch.device(device), torch.float32, 7)
    if reason is not None:
        pytest.skip(reason)
    resource = pytest.importorskip("resource")
    encoder = Encoder(EncoderConfig((1, 1, 1, 1), (4, 4, 4, 4), patch_size=8)).to(device)
    images, visible = torch.zeros(8, 3, 16, 16, device=device), torch.ones(8, 2, 2, dtype=torch.bool, device=device)

    def steps(count: int) -> int:
        """Bytes in use after that many steps, on the host at most, or on the device."""
        for _ in range(count):
            encoder(images, SparseGrid(active_set(visible, side=8), "minkowski")).sum().backward()
        if device == "cuda":
            free, total = torch.cuda.mem_get_info()
            return total - free
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    steps(50)
    before = steps(50)
    after = steps(500)
    assert after - before < 20e6


@needs_minkowski
def test_it_is_available_and_never_chosen_by_auto():
    backend = get_backend("minkowski")
    assert list(registry())[-1] == "minkowski"
    assert registry()["reference"].priority > backend.priority
    assert backend.rejects(torch.device("cpu"), torch.float32, 7) is None
    assert "float16 is not one of" in backend.rejects(torch.device("cpu"), torch.float16, 7)
    assert "device meta" in backend.rejects(torch.device("meta"), torch.float32, 7)
    if not minkowski.minkowski_engine().is_cuda_available():
        assert "--cuda" in backend.rejects(torch.device("cuda"), torch.float32, 7)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("no", name="MinkowskiEngine"), "is not installed"),
        (ModuleNotFoundError("no", name="numpy"), "needs the module numpy"),
        (ImportError("undefined symbol: x"), r"does not fit this Python and torch .*undefined symbol"),
    ],
)
def test_without_it_the_reason_and_the_command_are_told(error, reason, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(minkowski, "minkowski_engine", fail)
    backend_module._import_error.cache_clear()
    try:
        with pytest.raises(BackendUnavailableError, match=f"{reason}.*fcmae minkowski"):
            get_backend("minkowski")
    finally:
        backend_module._import_error.cache_clear()


@needs_minkowski
def test_importing_it_is_silent_and_leaves_the_environment_alone():
    code = (
        "import os; from sparse_ops.backends.minkowski.layers import minkowski_engine as load; load(); "
        "print(os.environ.get('OMP_NUM_THREADS'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")

"""The dense network on a processor: kernels compute what torch's operators do, and step aside where they may not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from model_helpers import check_rule, randomise, tiny_config
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrizations import weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from convnextv2 import VARIANTS, ConvNeXtV2, EncoderConfig, create_model
from sparse_ops import registry
from sparse_ops.backends.cpu.backend import BACKEND
from sparse_ops.conformance_maps import MAP_SHAPES, check_map_conformance
from sparse_ops.map_grid import MapGrid, map_backend

pytestmark = pytest.mark.skipif(registry()["cpu"].unavailable_reason() is not None, reason="no compiled kernels")


class Calls:
    """How often kernels ran in place of layers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.depthwise = self.mlp = 0
        for place, name, kind in (
            (BACKEND.maps, "depthwise", "depthwise"),
            (BACKEND, "mlp", "mlp"),
            (BACKEND, "mlp_result", "mlp"),
        ):
            own = getattr(place, name)

            def counted(*args, own=own, kind=kind, **options):
                setattr(self, kind, getattr(self, kind) + 1)
                return own(*args, **options)

            monkeypatch.setattr(place, name, counted, raising=False)

    def of(self, run: Callable[[], object]) -> tuple[int, int]:
        self.depthwise = self.mlp = 0
        run()
        return self.depthwise, self.mlp


@pytest.fixture
def calls(monkeypatch) -> Calls:
    return Calls(monkeypatch)


BLOCKS = 5


def network(backend: str = "auto", dtype: torch.dtype = torch.float32, **options) -> ConvNeXtV2:
    model = create_model(tiny_config(**options), num_classes=5, backend=backend)
    randomise(model)
    return model.to(dtype)


def on_torch(model: ConvNeXtV2, dtype: torch.dtype = torch.float32) -> ConvNeXtV2:
    rival = ConvNeXtV2(model.config, "torch").to(dtype)
    rival.load_state_dict(model.state_dict())
    return rival


def values(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    images = images.to(next(model.parameters()).dtype).requires_grad_()
    logits = model(images)
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad((logits * cotangent.to(logits)).sum(), [images, *parameters])
    return {"logits": logits.detach(), **dict(zip(("images", *names), gradients, strict=True))}


def check_values(model: ConvNeXtV2, images: Tensor) -> None:
    plain, oracle = on_torch(model), on_torch(model, torch.float64)
    check_rule(values(model, images), values(plain, images), values(oracle, images))


@pytest.mark.parametrize("size", [(100, 100), (250, 250), (299, 411), (224, 224), (33, 65), (32, 32), (61, 190)])
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_and_gradients_are_those_of_torch(size, batch, calls):
    model = network()
    images = torch.randn(batch, 3, *size)
    assert calls.of(lambda: model(images)) == (BLOCKS, BLOCKS)
    check_values(model, images)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if dims[0] > 128 else []) for name, (_, dims) in VARIANTS.items()],
)
def test_every_variant(name, calls):
    depths, dims = VARIANTS[name]
    wide = dims[0] > 128  # one block a stage where memory forbids all
    config = EncoderConfig((1, 1, 1, 1) if wide or sum(depths) > 18 else depths, dims)
    model = create_model(config, num_classes=3)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    images = torch.randn(1, 3, 70, 97)
    blocks = sum(config.depths)
    assert calls.of(lambda: model(images)) == (blocks, blocks)
    check_values(model, images)


@pytest.mark.parametrize("patch_size", [8, 16])
def test_other_strides_and_channels(patch_size, calls):
    model = network(patch_size=patch_size, in_chans=1)
    images = torch.randn(2, 1, 37, 50)
    assert calls.of(lambda: model(images)) == (BLOCKS, BLOCKS)
    check_values(model, images)


def test_no_images_are_no_trouble():
    model = network()
    found = values(model, torch.randn(0, 3, 64, 64))
    assert found["logits"].shape == (0, 5)
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_numbers_are_the_same(mode, calls):
    model, images = network().eval(), torch.randn(3, 3, 100, 70)
    expected = model(images)
    with mode():
        found = []
        assert calls.of(lambda: found.append(model(images))) == (BLOCKS, BLOCKS)
    torch.testing.assert_close(found[0], expected)  # another kernel, which keeps nothing


@pytest.mark.parametrize("as_given", ["channels_last", "strided", "parameter"])
def test_images_in_any_layout(as_given):
    model, images = network(), torch.randn(2, 3, 64, 96)
    expected = model(images)
    given = {
        "channels_last": lambda: images.contiguous(memory_format=torch.channels_last),
        "strided": lambda: images.transpose(2, 3).contiguous().transpose(2, 3),
        "parameter": lambda: nn.Parameter(images),
    }[as_given]()
    torch.testing.assert_close(model(given), expected, rtol=0, atol=1e-5)


def test_features_have_channels_first_and_hooks_on_blocks_leave_the_kernels_alone(calls):
    model, images, seen = network(), torch.randn(2, 3, 64, 96), []
    model.stages[1].register_forward_hook(lambda _, args, out: seen.append(out.shape))
    model.stages[2][0].register_forward_hook(lambda _, args, out: 2 * out)
    assert calls.of(lambda: seen.append(model.forward_features(images).shape)) == (BLOCKS, BLOCKS)
    assert seen == [(2, 16, 8, 12), (2, 24, 2, 3)]
    torch.testing.assert_close(
        model(images), copy.deepcopy(model).double()(images.double()).float(), rtol=1e-4, atol=1e-4
    )


def adapted(layer: nn.Module) -> nn.Module:
    """The same layer of a class of one's own, whose result has no sign."""
    kind = type(layer)
    own = type("Adapted", (kind,), {"forward": lambda self, x: kind.forward(self, x).abs()})
    layer = copy.deepcopy(layer)
    layer.__class__ = own
    return layer


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _, args, out: out.abs())
    return layer


def overridden(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x, own=layer.forward: own(x).abs()
    return layer


@pytest.mark.parametrize("change", [adapted, hooked, overridden])
@pytest.mark.parametrize("name", ["dwconv", "norm", "pwconv1", "act", "pwconv2"])
def test_a_layer_that_does_more_is_called(change, name, calls):
    model, images = network(), torch.randn(1, 3, 64, 64)
    before = model(images)
    block = model.stages[2][1]
    setattr(block, name, change(getattr(block, name)))
    found = []
    expected = (BLOCKS - 1, BLOCKS) if name == "dwconv" else (BLOCKS, BLOCKS - 1)
    assert calls.of(lambda: found.append(model(images))) == expected
    assert not torch.allclose(found[0], before)
    model.backend = "torch"
    torch.testing.assert_close(found[0], model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{"dilation": 2, "padding": 6}, {"padding_mode": "circular"}, {"groups": 4}, {"kernel_size": 5, "padding": 2}],
)
def test_a_convolution_of_another_kind_is_called(changes, calls):
    model, images = network(), torch.randn(2, 3, 64, 64)
    model.stages[0][0].dwconv = nn.Conv2d(8, 8, **{"kernel_size": 7, "padding": 3, "groups": 8, **changes})
    assert calls.of(lambda: model(images)) == (BLOCKS - 1, BLOCKS)
    check_values_of(model, images)


def test_layers_without_a_bias():
    model = network()
    block = model.stages[0][0]
    block.dwconv.bias = None
    block.norm.bias = None
    block.pwconv2.bias = None
    check_values_of(model, torch.randn(2, 3, 64, 64))


def check_values_of(model: ConvNeXtV2, images: Tensor) -> None:
    """As :func:`check_values` for a network whose layers were exchanged."""
    plain = copy.deepcopy(model)
    plain.backend = "torch"
    check_rule(values(model, images), values(plain, images), values(copy.deepcopy(plain).double(), images))


def test_parametrised_weights_are_those_that_run(calls):
    model, images = network(), torch.randn(2, 3, 64, 64)
    for layer in (model.stages[0][0].dwconv, model.stages[1][0].pwconv1):
        weight_norm(layer)
        layer.parametrizations.weight.original0.data *= 2
    assert calls.of(lambda: model(images)) == (BLOCKS, BLOCKS)
    check_values_of(model, images)


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def traced(model: nn.Module, images: Tensor) -> object:
    return torch.jit.trace(model.eval(), images, check_trace=False)


def forward_mode(model: nn.Module, images: Tensor) -> object:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(images, torch.ones_like(images)))).tangent


def within(context: Callable[[], object]) -> Callable[[nn.Module, Tensor], object]:
    def run(model: nn.Module, images: Tensor) -> object:
        with context():
            return model(images)

    return run


def with_global_hook(model: nn.Module, images: Tensor) -> object:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        return model(images)
    finally:
        handle.remove()


ASIDE = {
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "function mode": within(Doubling),
    "dispatch mode": within(Watching),
    "global hook": with_global_hook,
    "subclass": lambda model, images: model(images.as_subclass(Subclass)),
    "float64": lambda model, images: model.double()(images.double()),
    "bfloat16 in training": lambda model, images: model.bfloat16()(images.bfloat16()),
    "meta": lambda model, images: model.to("meta")(images.to("meta")),
    "jit trace": traced,
    "fx": lambda model, images: torch.fx.symbolic_trace(model.eval())(images),
    "export": lambda model, images: torch.export.export(model.eval(), (images,)).module()(images),
    "jvp": lambda model, images: torch.func.jvp(model, (images,), (images,)),
    "vmap": lambda model, images: torch.vmap(lambda image: model(image[None]))(images),
    "grad": lambda model, images: torch.func.grad(lambda x: model(x).sum())(images),
    "forward mode": forward_mode,
    "torch": lambda model, images: on_torch(model)(images),
    "kernel size": lambda model, images: network(kernel_size=5)(images),
}


@pytest.mark.parametrize("case", ASIDE)
def test_the_kernels_step_aside(case, calls):
    model, images = network(), torch.randn(2, 3, 64, 64)
    assert calls.of(lambda: ASIDE[case](model, images)) == ((0, BLOCKS) if case == "kernel size" else (0, 0))


def test_a_default_device_and_functional_call_do_not_keep_them_away(calls):
    model, images = network(), torch.randn(2, 3, 64, 64)
    with torch.device("cpu"):
        assert calls.of(lambda: model(images)) == (BLOCKS, BLOCKS)
    twice = {name: 2 * value for name, value in model.named_parameters()}
    found = []
    assert calls.of(lambda: found.append(torch.func.functional_call(model, twice, (images,)))) == (BLOCKS, BLOCKS)
    torch.testing.assert_close(
        found[0], torch.func.functional_call(on_torch(model), twice, (images,)), rtol=1e-4, atol=1e-3
    )


def test_compiled_networks_agree():
    model, images = network().eval(), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients():
    def penalty(model: nn.Module, images: Tensor) -> list[Tensor]:
        images = images.to(next(model.parameters()).dtype).requires_grad_()
        (slope,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), [images, *model.parameters()], allow_unused=True))

    model, images = network(), torch.randn(2, 3, 40, 70)
    results = penalty(model, images), penalty(on_torch(model), images), penalty(on_torch(model, torch.float64), images)
    found, plain, oracle = ({str(i): g for i, g in enumerate(r) if g is not None} for r in results)
    assert len(found) > 60
    check_rule(found, plain, oracle)


def test_weights_that_share_a_graph_are_differentiated_twice_alone():
    """Two layers with one weight: what a gradient's gradient passes on must not be counted twice."""
    grid, layer = MapGrid(1), nn.Conv2d(4, 4, 7, padding=3, groups=4)
    x = torch.randn(1, 4, 9, 5)
    grid = grid.native(x, 7)

    def twice(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        given = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(call(call(given).tanh()).sin().sum(), layer.weight, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), [given, layer.weight, layer.bias]))

    for found, expected in zip(twice(lambda x: grid.depthwise(layer, x)), twice(layer), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_gradients_are_accumulated_and_checkpointed():
    model, images = network(), torch.randn(2, 3, 64, 64)
    expected = values(model, images)
    own = model.stages[2].forward
    model.stages[2].forward = lambda x, grid: checkpoint(own, x, grid, use_reentrant=False)
    for name, found in values(model, images).items():
        assert torch.equal(found, expected[name]), name


def test_frozen_layers():
    model, images = network(), torch.randn(2, 3, 64, 64)
    expected = values(model, images)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("stages.2.1.pwconv") or name.endswith("dwconv.bias")
    cotangent = torch.randn(2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float()
    (model(images) * cotangent).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


def test_copies_and_moves_keep_the_choice(calls):
    images = torch.randn(1, 3, 64, 64)
    for backend, count in (("auto", BLOCKS), ("torch", 0), ("cpu", BLOCKS)):
        model = network(backend)
        copies = [
            model,
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            model.to("meta").to_empty(device="cpu"),
        ]
        for each in copies:
            assert calls.of(lambda each=each: each(images)) == (count, count)
    old = network()
    del old.__dict__["backend"]  # of a pickle from before there was a choice
    assert calls.of(lambda: old(images)) == (BLOCKS, BLOCKS)
    assert calls.of(lambda: nn.DataParallel(model)(images)) == (BLOCKS, BLOCKS)


def test_sizes_and_modes_change_between_calls():
    model = network(drop_path_rate=0.5)
    rival = on_torch(model)
    for size, training in (((64, 64), True), ((97, 40), False), ((64, 96), True), ((64, 64), False)):
        images = torch.randn(2, 3, *size)
        found = []
        for each in (model, rival):
            torch.manual_seed(1)
            found.append(each.train(training)(images))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_bfloat16_in_evaluation(calls):
    model, images = network(dtype=torch.bfloat16).eval(), torch.randn(2, 3, 64, 64)
    exact = on_torch(model, torch.float64)(images.bfloat16().double())
    with torch.no_grad():
        plain = on_torch(model, torch.bfloat16)(images.bfloat16())
        found = []
        calls.of(lambda: found.append(model(images.bfloat16())))
    assert found[0].dtype == torch.bfloat16
    check_rule({"logits": found[0]}, {"logits": plain}, {"logits": exact})


def test_what_runs_is_told():
    assert network().runs_on == network("cpu").runs_on == "cpu"
    assert network("torch").runs_on == "torch: torch's operators were asked for"
    assert network().to("meta").runs_on == "torch: the kernels run on the CPU, not on meta"
    assert network().double().runs_on.startswith("torch: dtype torch.float64 is not one of")
    assert network(kernel_size=5).runs_on == "torch: kernel size 5 is not 7"
    assert network().bfloat16().runs_on == "torch: torch.bfloat16 is served in evaluation only"
    for name in ("reference", "triton", "nothing"):
        with pytest.raises(ValueError, match=rf"must be one of auto, torch, cpu, got '{name}'"):
            create_model("atto", backend=name)


def test_without_the_library(monkeypatch, calls, caplog):
    monkeypatch.setattr(type(BACKEND), "unavailable_reason", lambda self: "no compiler")
    map_backend.cache_clear()
    try:
        model, images = network(), torch.randn(1, 3, 64, 64)
        assert calls.of(lambda: model(images)) == (0, 0)
        assert model.runs_on == "torch: no backend with kernels for whole maps is here"
        assert "no compiler" in caplog.text
        with pytest.raises(RuntimeError, match="no compiler"):
            network("cpu")
    finally:
        map_backend.cache_clear()


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_the_bits(threads):
    model, images = network(), torch.randn(3, 3, 160, 200)
    block = model.stages[0][0].dwconv
    x, weight = torch.randn(3, 40, 50, 8), block.weight.detach()
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        results.append([BACKEND.maps.depthwise(x, weight, None, reverse_taps=True)])
        results[-1] += BACKEND.maps.depthwise_weight_grad(x, x, 7)
        with torch.no_grad():
            results[-1].append(MapGrid(3).native(images, 7).depthwise(block, x.permute(0, 3, 1, 2)))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", MAP_SHAPES)
def test_kernels_for_maps(shape, dtype):
    """Every entry is written, too: fresh memory holds NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        check_map_conformance(BACKEND.maps, shape, dtype)
    finally:
        torch.use_deterministic_algorithms(False)


def test_wrong_kernels_for_maps_are_found():
    class Wrong(type(BACKEND.maps)):
        def depthwise_weight_grad(self, x, grad, kernel_size):
            weight, bias = super().depthwise_weight_grad(x, grad, kernel_size)
            return weight, bias * 1.0001

    with pytest.raises(AssertionError, match="grad of bias"):
        check_map_conformance(Wrong(), MAP_SHAPES[2], torch.float32)

"""Tools that call layers find them: hooks, summaries, FLOP counters, feature extractors, adapters, transforms."""

import copy
import re

import pytest
import timm
import torch
from model_helpers import BACKENDS, RAGGED, as_rows, images_for, randomise, tiny_config
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from convnextv2 import Encoder, create_fcmae, create_model
from sparse_ops import ActiveSet, SparseGrid
from sparse_ops.layers import has_hooks
from sparse_ops.oracle import MaskedDenseGrid

peft, thop, torchinfo = map(pytest.importorskip, ("peft", "thop", "torchinfo"))  # a GPU machine may lack them
VISIBLE = RAGGED


def sparse_grid(backend: str) -> SparseGrid:
    return SparseGrid(ActiveSet.from_mask(~VISIBLE), backend)


def recorded(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Fills with the shape of every module's output when the model is called."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: shapes.update({name: tuple(out.shape)}))
    return shapes


def test_hooks_on_every_module_of_the_dense_network_fire():
    model = create_model("atto", num_classes=5).eval()
    shapes = recorded(model)
    model(torch.randn(2, 3, 64, 96))
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    assert len(leaves) == 94
    assert set(shapes) == {name for name, _ in model.named_modules()} - {"downsample_layers", "stages"}  # lists
    # As in the official network: channels first between layers, last where every cell is treated by itself.
    assert shapes["downsample_layers.0"] == (2, 40, 16, 24)
    assert shapes["downsample_layers.1.1"] == shapes["stages.1"] == shapes["stages.1.0"] == (2, 80, 8, 12)
    assert shapes["stages.1.0.dwconv"] == shapes["stages.1.0.drop_path"] == (2, 80, 8, 12)
    assert shapes["stages.1.0.grn"] == (2, 8, 12, 320)


def test_features_are_one_tensor_with_channels_first():
    ours, theirs = create_model("atto").eval(), timm.create_model("convnextv2_atto").eval()
    images = torch.randn(1, 3, 64, 96)
    assert ours.forward_features(images).shape == theirs.forward_features(images).shape == (1, 320, 2, 3)


def test_flops_are_those_of_timm():
    counts = []
    for model in (create_model("atto"), timm.create_model("convnextv2_atto")):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, 3, 224, 224))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 547_332_480


def test_summaries_count_every_layer():
    # As the official network, timm's takes linear layers for the expansion when conv_mlp is off.
    ours, theirs = create_model("atto").eval(), timm.create_model("convnextv2_atto", conv_mlp=False).eval()
    summaries = [torchinfo.summary(model, (1, 3, 224, 224), verbose=0) for model in (ours, theirs)]
    assert summaries[0].total_params == 3_708_400
    assert summaries[0].total_mult_adds == pytest.approx(69.5e6, rel=1e-3)
    assert summaries[0].total_mult_adds == pytest.approx(summaries[1].total_mult_adds, rel=1e-3)
    work = [thop.profile(model, (torch.randn(1, 3, 224, 224),), verbose=False)[0] for model in (ours, theirs)]
    assert work[0] == pytest.approx(work[1], rel=0.01)  # it counts LayerNorms of one of them only


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.2])
def test_torchvision_extracts_features(drop_path_rate):
    model, images = create_model("atto", num_classes=5, drop_path_rate=drop_path_rate).eval(), torch.randn(2, 3, 64, 64)
    shapes = recorded(watched := copy.deepcopy(model))
    logits = watched(images)
    extracted = create_feature_extractor(model, ["stages.0", "stages.2", "head"]).eval()(images)
    assert torch.equal(extracted["head"], logits)
    assert {name: tuple(value.shape) for name, value in extracted.items()} == {
        name: shapes[name] for name in ("stages.0", "stages.2", "head")
    }


def test_functional_call_and_vmap():
    model, images = create_model(tiny_config(), num_classes=5).eval(), torch.randn(3, 3, 64, 64)
    randomise(model)
    parameters = dict(model.named_parameters())
    expected = model(images)

    def of_one(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],))[0]

    torch.testing.assert_close(torch.vmap(of_one, (None, 0))(parameters, images), expected)
    # Gradients of single images, and an ensemble in one call.
    gradients = torch.vmap(torch.func.grad(lambda *a: of_one(*a).sum()), (None, 0))(parameters, images)
    whole = torch.autograd.grad(expected.sum(), list(parameters.values()))
    for name, gradient in zip(parameters, whole, strict=True):
        torch.testing.assert_close(gradients[name].sum(0), gradient, rtol=1e-3, atol=1e-3)
    stacked = {name: torch.stack((value, 0.5 * value)) for name, value in parameters.items()}
    both = torch.vmap(lambda p: torch.func.functional_call(model, p, (images,)))(stacked)
    torch.testing.assert_close(both[0], expected)
    assert not torch.allclose(both[1], expected)


@pytest.mark.parametrize(
    ("target", "rank"),
    [
        (r".*pwconv[12]", 4),
        (r"downsample_layers\.(0\.0|[1-3]\.1)", 4),
        (r"stages\.0\.\d\.dwconv", 40),  # a multiple of the groups, says peft
        ("head", 4),
    ],
)
def test_adapters_of_peft_train(target, rank):
    model, images = create_model("atto", num_classes=5), torch.randn(2, 3, 64, 64)
    before = model(images)
    config = peft.LoraConfig(r=rank, target_modules=target, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    out = adapted(images)
    assert not torch.allclose(out, before)
    out.square().sum().backward()
    trained = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert [name for name, gradient in trained.items() if gradient is None or not gradient.any()] == []


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "minkowski"])
def test_hooks_fire_on_a_sparse_grid_and_change_nothing(backend):
    encoder = Encoder(tiny_config(patch_size=16))
    randomise(encoder)
    images, grid = images_for(VISIBLE), sparse_grid(backend)
    expected = encoder(images, grid)
    shapes = recorded(encoder)
    torch.testing.assert_close(encoder(images, grid), expected, rtol=1e-4, atol=1e-4)
    assert set(shapes) == {name for name, _ in encoder.named_modules()} - {"downsample_layers", "stages"}
    cells = grid.active.num_cells
    assert shapes["stages.0.0.dwconv"] == (cells, 8)
    assert shapes["stages.0.0.grn"] == (cells, 32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parametrised_weights_are_those_that_run(backend):
    encoder = Encoder(tiny_config(patch_size=16)).double()
    randomise(encoder)
    block = encoder.stages[0][0]
    for layer in (block.dwconv, block.pwconv1):
        weight_norm(layer)
        layer.parametrizations.weight.original0.data *= 2
    images = images_for(VISIBLE, dtype=torch.float64)
    oracle = MaskedDenseGrid(VISIBLE, dtype=torch.float64)
    expected = as_rows(encoder(images, oracle), oracle, VISIBLE, 1)
    torch.testing.assert_close(encoder(images, sparse_grid(backend)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_on_a_sparse_grid_are_trained_or_refused(backend):
    """A layer that does more than torch's own is called, and where it cannot be, refused: never passed over."""

    class Adapted(nn.Linear):
        def __init__(self, dim: int, out: int) -> None:
            super().__init__(dim, out)
            self.extra = nn.Parameter(torch.zeros(out))

        def forward(self, x):
            return super().forward(x) + self.extra

    class AdaptedConv(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = create_fcmae(tiny_config(), img_size=64, backend=backend)
    block = model.encoder.stages[0][0]
    block.pwconv1 = Adapted(8, 32)
    model(torch.randn(2, 3, 64, 64)).loss.backward()
    assert block.pwconv1.extra.grad.abs().sum() > 0
    for place, adapted in (
        (block, {"dwconv": AdaptedConv(8, 8, 7, padding=3, groups=8)}),
        (model, {"proj": AdaptedConv(24, 512, 1)}),
    ):
        name, layer = next(iter(adapted.items()))
        own = getattr(place, name)
        setattr(place, name, layer)
        with pytest.raises(TypeError, match="AdaptedConv does more than that"):
            model(torch.randn(2, 3, 64, 64))
        setattr(place, name, own)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forward_of_a_layer_of_its_own_is_called_or_refused(backend):
    model = create_fcmae(tiny_config(), img_size=64, backend=backend)
    block, called = model.encoder.stages[0][0], []
    linear = block.pwconv1.forward
    block.pwconv1.forward = lambda x: (called.append(1), linear(x))[1]
    model(torch.randn(2, 3, 64, 64))
    assert called == [1]
    block.dwconv.forward = own = lambda x: x
    block.dwconv.register_forward_hook(lambda *seen: None)
    with pytest.raises(TypeError, match="Conv2d does more than that"):
        model(torch.randn(2, 3, 64, 64))
    assert block.dwconv.forward is own


@pytest.mark.parametrize("backend", BACKENDS)
def test_convolutions_of_another_geometry_are_refused_on_a_sparse_grid(backend):
    model = create_fcmae(tiny_config(), img_size=64, backend=backend)
    (stem, reduce, *_), block = model.encoder.downsample_layers, model.encoder.stages[0][0]
    usual = {"groups": 8, "padding": 3}
    unusual = (
        {"dilation": 2, "padding": 6},
        {"stride": 2},
        {"padding": 0},
        {"padding_mode": "circular"},
        {"groups": 1},
    )
    cases = [(block, "dwconv", nn.Conv2d(8, 8, 7, **{**usual, **changes})) for changes in unusual]
    cases += [(reduce, "1", nn.Conv2d(8, reduce[1].out_channels, 2, 1)), (stem, "0", nn.Conv2d(3, 8, 4, 2))]
    for place, name, layer in cases:
        own = getattr(place, name)
        setattr(place, name, layer)
        with pytest.raises(TypeError, match=re.escape(f"{layer} is none that")):
            model(torch.randn(2, 3, 64, 64))
        setattr(place, name, own)
    block.dwconv = nn.Conv2d(8, 8, 7, **{**usual, "padding": "same"})
    model(torch.randn(2, 3, 64, 64)).loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "pwconv1", nn.Linear(8, 32, bias=False)),
        lambda block: setattr(block, "norm", nn.LayerNorm(8, eps=1e-6, elementwise_affine=False)),
        lambda block: setattr(block, "norm", nn.LayerNorm(8, eps=1e-6, bias=False)),
    ],
)
def test_layers_without_some_weights_run_on_a_sparse_grid(backend, change):
    encoder = Encoder(tiny_config(patch_size=16))
    change(encoder.stages[0][0])
    encoder.double()
    images = images_for(VISIBLE, dtype=torch.float64)
    oracle = MaskedDenseGrid(VISIBLE, dtype=torch.float64)
    expected = as_rows(encoder(images, oracle), oracle, VISIBLE, 1)
    torch.testing.assert_close(encoder(images, sparse_grid(backend)), expected)


def test_functional_calls_and_parametrizations_reach_the_decoder():
    model = create_fcmae(tiny_config(), img_size=64)
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 4)
    expected = model(images, noise=noise).loss
    weights = {name: value.detach() for name, value in model.named_parameters()}
    found = torch.func.functional_call(model, weights, (images,), {"noise": noise}).loss
    torch.testing.assert_close(found, expected)
    weight_norm(model.decoder[0].dwconv)
    torch.testing.assert_close(model(images, noise=noise).loss, expected)


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ],
)
def test_hooks_are_seen(register):
    """Torch keeps them under names of its own: were those to change, this would tell."""
    layer = nn.Linear(2, 2)
    assert not has_hooks(layer)
    handle = register(layer, lambda *_: None)
    assert has_hooks(layer)
    handle.remove()
    assert not has_hooks(layer)

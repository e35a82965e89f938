from __future__ import annotations

import itertools

import pytest
import torch
from weights_helpers import ENCODER, fcmae, randomise, same, sparse_official

from convnextv2 import VARIANTS, Encoder, EncoderConfig, create_model
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import ClassifierConfig, encoder_config
from convnextv2.weights import layouts
from convnextv2.weights.checkpoint import CheckpointError
from convnextv2.weights.evaluators import timm_network
from convnextv2.weights.layouts import detect_layout
from convnextv2.weights.layouts.sparse_official import map_to_taps, taps_to_map
from convnextv2.weights.reading import read_weights, write_layout
from convnextv2.weights.verify import verify_conversion


def test_official_sparse_layout_to_ours_and_back_bit_exact():
    model = fcmae()
    official = sparse_official(model)
    assert official["encoder.stages.0.0.dwconv.kernel"].shape == (49, 8)
    assert official["encoder.downsample_layers.1.1.kernel"].shape == (4, 8, 16)
    assert detect_layout(official) == "sparse-official"
    weights = read_weights(official)
    assert weights.config == ENCODER
    assert same(write_layout(weights, "fcmae"), model.state_dict())
    assert same(write_layout(read_weights(model.state_dict()), "sparse-official"), official)


def test_taps_are_numbered_with_rows_fastest():
    kernel = torch.arange(9.0)[:, None]
    assert taps_to_map(kernel)[0].tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    pooling = torch.arange(4.0).view(4, 1, 1) + torch.tensor([[[0.0, 10.0], [20.0, 30.0], [40.0, 50.0]]])
    assert taps_to_map(pooling).shape == (2, 3, 2, 2)
    assert taps_to_map(pooling)[1, 2].tolist() == [[50, 52], [51, 53]]
    assert torch.equal(map_to_taps(taps_to_map(pooling)), pooling)


def test_two_dimensional_kernels_are_told_apart_by_name():
    """A pointwise layer whose kernel looks like a depthwise one: 49 input channels, 2-D."""
    config = EncoderConfig((1, 1, 1, 1), (49, 4, 4, 4))
    model = fcmae(config)
    official = sparse_official(model)
    for name in [name for name in official if name.endswith(".linear.weight")]:
        official[name.replace(".linear.weight", ".kernel")] = official.pop(name).t().contiguous()
        bias = name.replace("weight", "bias")
        official[bias.replace(".linear", "")] = official.pop(bias)[None]
    assert official["encoder.stages.0.0.pwconv1.kernel"].shape == (49, 196)
    assert official["encoder.stages.0.0.dwconv.kernel"].shape == (49, 49)
    assert same(write_layout(read_weights(official), "fcmae"), model.state_dict())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("encoder.stages.0.0.dwconv.kernel", (48, 8), "not a square"),
        ("encoder.stages.0.0.dwconv.kernel", (49, 8, 1), "2 axes"),
        ("encoder.downsample_layers.1.1.kernel", (4, 16), "3 axes"),
        ("encoder.downsample_layers.1.1.kernel", (9, 8, 16), "shape"),
    ],
)
def test_wrong_sparse_kernels(name, shape, message):
    with pytest.raises(CheckpointError, match=message):
        read_weights({**sparse_official(fcmae()), name: torch.ones(shape)})


def test_wrong_pointwise_kernels():
    official = sparse_official(fcmae())
    del official["encoder.stages.0.0.pwconv1.linear.weight"]
    with pytest.raises(CheckpointError, match="pointwise kernel has 2 axes"):
        read_weights({**official, "encoder.stages.0.0.pwconv1.kernel": torch.ones(1, 8, 32)})


@pytest.mark.parametrize("conv_mlp", [False, True])
@pytest.mark.parametrize("patch_size", [4, 1])
def test_parity_with_timm(conv_mlp, patch_size):
    from timm.models.convnext import ConvNeXt

    torch.manual_seed(0)
    network = randomise(
        ConvNeXt(
            depths=ENCODER.depths,
            dims=ENCODER.dims,
            num_classes=5,
            patch_size=patch_size,
            use_grn=True,
            ls_init_value=None,
            conv_mlp=conv_mlp,
        )
    )
    state = network.state_dict()
    weights = read_weights(state)
    assert weights.layout == "timm"
    model = create_model(weights.config, num_classes=5).double().eval()
    model.load_state_dict(write_layout(weights, "official-dense"))
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(model(images), network(images), rtol=0, atol=1e-10)
    verification = verify_conversion(state, model.state_dict())
    assert verification.foreign is not None
    assert verification.passed
    if not conv_mlp:
        assert same(write_layout(weights, "timm"), state)


def test_ours_to_timm_runs_in_timm():
    model = randomise(create_model(ENCODER, num_classes=5))
    network = timm_network(write_layout(read_weights(model.state_dict()), "timm"), ENCODER)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(network(images), model(images), rtol=0, atol=1e-10)


@pytest.mark.parametrize("prefix", [True, False])
def test_parity_with_transformers(prefix):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    settings = {"depths": list(ENCODER.depths), "hidden_sizes": list(ENCODER.dims), "num_labels": 5}
    network = randomise(
        transformers.ConvNextV2ForImageClassification(
            transformers.ConvNextV2Config(**settings, layer_norm_eps=1e-6, image_size=64)
        )
    )
    state = network.state_dict()
    weights = read_weights(state if prefix else {name.removeprefix("convnextv2."): v for name, v in state.items()})
    assert weights.layout == "transformers"
    model = create_model(weights.config, num_classes=5).double().eval()
    model.load_state_dict(write_layout(weights, "official-dense"))
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(model(images), network(images).logits, rtol=0, atol=1e-10)
    assert same(write_layout(weights, "transformers"), state)


def test_transformers_names():
    """Without transformers: the names of its published files."""
    written = write_layout(read_weights(create_model(ENCODER, num_classes=5).state_dict()), "transformers")
    assert {
        "convnextv2.embeddings.patch_embeddings.weight",
        "convnextv2.embeddings.layernorm.bias",
        "convnextv2.encoder.stages.0.layers.0.dwconv.weight",
        "convnextv2.encoder.stages.1.downsampling_layer.0.weight",
        "convnextv2.encoder.stages.1.layers.1.layernorm.weight",
        "convnextv2.encoder.stages.1.layers.1.grn.weight",
        "convnextv2.encoder.stages.3.layers.0.pwconv2.bias",
        "convnextv2.layernorm.weight",
        "classifier.bias",
    } <= written.keys()


def test_every_tensor_has_a_name_of_its_own_in_every_layout():
    names = {"encoder": list(Encoder(ENCODER).state_dict()), "head": ["norm.weight", "norm.bias", "head.weight"]}
    for layout in layouts.LAYOUTS:
        foreign = [layouts.get_layout(layout).name_of(name) for name in itertools.chain(*names.values())]
        assert len(set(foreign)) == len(foreign)


def test_a_layout_recognises_its_own_files_alone():
    weights = read_weights(fcmae().state_dict())
    files = {name: write_layout(weights, name) for name in layouts.LAYOUTS}
    files["sparse-official, published"] = {n.removeprefix("encoder."): v for n, v in files["sparse-official"].items()}
    for name, state in files.items():
        found = [layout.name for layout in layouts.LAYOUTS.values() if layout.recognises(state.keys())]
        assert found == [name.partition(",")[0]]
        assert read_weights(state).config == ENCODER


@pytest.mark.parametrize("name", VARIANTS)
def test_all_variants_convert_by_name_and_shape(name):
    with torch.device("meta"):
        config = encoder_config(name)
        model = ConvNeXtV2(ClassifierConfig(config, 1000))
    state = model.state_dict()
    for layout in layouts.LAYOUTS:
        written = write_layout(read_weights(state), layout)
        assert detect_layout(written) == layout
        back = read_weights(written)
        assert back.config == config
        headless = layout in ("fcmae", "sparse-official")
        expected = {k: v.shape for k, v in state.items() if not (headless and k.split(".")[0] in ("norm", "head"))}
        assert {name: tensor.shape for name, tensor in back} == expected

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import nn

from convnextv2 import VARIANTS, Encoder, EncoderConfig, FCMAEConfig, create_fcmae, create_model
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import ClassifierConfig, encoder_config
from convnextv2.weights import layouts, verify
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from convnextv2.weights.layouts import detect_layout, map_to_taps, taps_to_map
from convnextv2.weights.loading import init_classifier, load_model
from convnextv2.weights.reading import describe, encoder_state_dict, infer_config, read_weights, write_layout
from convnextv2.weights.verify import official_sparse_features, timm_network, verify_conversion
from sparse_ops import ActiveSet

ENCODER = EncoderConfig((1, 2, 1, 1), (8, 16, 16, 24))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that no kernel is symmetric and GRN does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return model.double().eval()


def fcmae(config: EncoderConfig = ENCODER):
    side = 4 * config.patch_size
    return randomise(create_fcmae(config, img_size=side, decoder_dim=16, decoder_depth=2, backend="reference"))


def sparse_official(model) -> dict[str, torch.Tensor]:
    """The official sparse layout of a masked autoencoder, written out by hand, tap by tap."""
    result = {}
    for name, value in model.state_dict().items():
        if re.search(r"encoder\.stages.*dwconv\.weight", name) or re.search(
            r"encoder\.downsample.*[123]\.1\.weight", name
        ):
            side = value.shape[-1]
            taps = [value[:, :, tap % side, tap // side] for tap in range(side * side)]
            kernel = torch.stack([tap[:, 0] if "dwconv" in name else tap.t() for tap in taps])
            result[name.replace(".weight", ".kernel")] = kernel
        elif re.search(r"encoder\.stages.*dwconv\.bias", name) or re.search(
            r"encoder\.downsample.*[123]\.1\.bias", name
        ):
            result[name] = value[None]
        elif re.search(r"encoder\.stages.*grn", name):
            result[name] = value[0, 0]
        elif re.search(r"encoder\.stages.*\.norm\.", name) or re.search(r"encoder\.downsample.*[123]\.0\.", name):
            result[re.sub(r"\.(weight|bias)$", r".ln.\1", name)] = value
        elif re.search(r"encoder\.stages.*pwconv", name):
            result[re.sub(r"\.(weight|bias)$", r".linear.\1", name)] = value
        else:
            result[name] = value
    return result


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# Official sparse ---------------------------------------------------------------------------------------------------


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


def test_the_independent_evaluator_is_the_sparse_network():
    model = fcmae()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    visible = torch.tensor([[[1, 0, 1], [0, 1, 1]], [[0, 0, 0], [1, 0, 0]]], dtype=torch.bool)
    features = official_sparse_features(sparse_official(model), images, visible)
    with torch.no_grad():
        expected, _ = model.encode(images, ActiveSet.from_mask(~visible))
    assert features.shape == (5, 24)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize(("patch_size", "in_chans", "kernel_size"), [(32, 3, 7), (16, 1, 5), (8, 5, 3)])
def test_verification_passes_for_right_conversions(patch_size, in_chans, kernel_size):
    config = EncoderConfig((1, 1, 2, 1), (4, 6, 5, 8), in_chans, patch_size, kernel_size)
    model = fcmae(config)
    official = sparse_official(model)
    assert read_weights(official).config == config
    dense = write_layout(read_weights(official), "official-dense")
    for source, written in ((official, dense), (model.state_dict(), dense), (dense, official)):
        verification = verify_conversion(source, written)
        assert verification.passed
        assert verification.largest < 1e-13
        assert f"{verification.largest:.1e}" in str(verification)


def test_verification_catches_the_missing_axis_swap(monkeypatch):
    official = sparse_official(fcmae())

    def without_swap(kernel):
        side = round(kernel.shape[0] ** 0.5)
        return kernel.permute(tuple(reversed(range(kernel.dim())))).unflatten(-1, (side, side)).contiguous()

    monkeypatch.setattr(layouts, "taps_to_map", without_swap)
    verification = verify_conversion(official, write_layout(read_weights(official), "official-dense"))
    assert not verification.passed
    assert verification.masked > 1e-2
    assert verification.unmasked > 1e-2


@pytest.mark.parametrize("name", ["stages.2.0.dwconv.weight", "downsample_layers.2.1.weight"])
@pytest.mark.parametrize("change", [lambda w: w.transpose(-1, -2), lambda w: w.flip(-1), lambda w: w * (1 + 1e-8)])
def test_verification_catches_a_single_wrong_kernel(name, change):
    official = sparse_official(fcmae())
    dense = write_layout(read_weights(official), "official-dense")
    dense[name] = change(dense[name]).contiguous()
    verification = verify_conversion(official, dense)
    assert not verification.passed
    assert verification.largest > verify.TOLERANCE


def test_verification_of_nan_or_another_shape_does_not_pass():
    assert not verify.Verification(float("nan"), 0.0).passed
    other = fcmae(EncoderConfig((1, 1, 1, 1), (8, 16, 16, 24)))
    assert not verify_conversion(fcmae().state_dict(), other.encoder.state_dict()).passed


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


def test_official_sparse_file_loads_as_a_masked_autoencoder(tmp_path):
    model = fcmae()
    torch.save({"model": sparse_official(model), "epoch": 1}, tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth", backend="reference").double().eval()
    assert loaded.config.decoder_depth == 2
    assert loaded.config.decoder_dim == 16
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 0]])
    loaded_pred, pred = loaded(images, mask).pred, model(images, mask).pred
    torch.testing.assert_close(loaded_pred, pred, rtol=1e-5, atol=1e-5)


# Official dense ----------------------------------------------------------------------------------------------------


def test_published_encoder_and_classifier_layouts():
    classifier = randomise(create_model(ENCODER, num_classes=5))
    state = classifier.state_dict()
    assert infer_config(state) == ClassifierConfig(ENCODER, 5)
    encoder = {name: value for name, value in state.items() if name.split(".")[0] not in ("norm", "head")}
    assert infer_config(encoder) == ENCODER
    assert isinstance(infer_config(fcmae().state_dict()), FCMAEConfig)
    assert same(encoder_state_dict(Checkpoint(state)), encoder)
    assert same(write_layout(read_weights(state), "official-dense"), state)


@pytest.mark.parametrize("name", VARIANTS)
def test_all_variants_convert_by_name_and_shape(name):
    with torch.device("meta"):
        config = encoder_config(name)
        model = ConvNeXtV2(ClassifierConfig(config, 1000))
    state = model.state_dict()
    for layout in layouts.LAYOUTS:
        written = write_layout(read_weights(state), layout)
        assert detect_layout(written) == ("official-dense" if layout == "official-dense" else layout)
        back = read_weights(written)
        assert back.config == config
        for group in ("encoder", "head"):
            expected = getattr(read_weights(state), group) if group == "encoder" or back.head else {}
            assert {k: v.shape for k, v in getattr(back, group).items()} == {k: v.shape for k, v in expected.items()}


def test_half_precision_is_widened_without_loss():
    state = {name: value.half() for name, value in fcmae().state_dict().items()}
    weights = read_weights(state)
    assert weights.widened
    for name, value in weights.encoder.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[f"encoder.{name}"].float())


# Foreign networks --------------------------------------------------------------------------------------------------


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


def test_timm_has_no_patch_size_16():
    config = EncoderConfig((1, 1, 1, 1), (4, 4, 4, 4), patch_size=16)
    state = fcmae(config).state_dict()
    with pytest.raises(CheckpointError, match="stride 2"):
        verify_conversion(state, write_layout(read_weights(state), "timm"))


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


# Starting a classifier ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["fcmae", "sparse-official", "official-dense", "timm", "transformers"])
def test_classifier_starts_from_any_layout(layout):
    source = fcmae()
    state = write_layout(read_weights(source.state_dict()), layout)
    model = create_model(ENCODER, num_classes=4).double()
    head = model.head.weight.clone()
    report = init_classifier(model, Checkpoint(state))
    assert all(torch.equal(model.state_dict()[name], v) for name, v in source.encoder.state_dict().items())
    assert torch.equal(model.head.weight, head)
    assert set(report.new) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert ("mask_token" in report.dropped) == (layout in ("fcmae", "sparse-official"))
    assert len(report.loaded) == len(source.encoder.state_dict())
    assert "freshly initialised: norm, head" in str(report)


def test_classifier_keeps_the_head_of_as_many_classes_only():
    source = randomise(create_model(ENCODER, num_classes=4))
    checkpoint = Checkpoint(source.state_dict())
    model = create_model(ENCODER, num_classes=4).double()
    report = init_classifier(model, checkpoint)
    assert same(dict(model.state_dict()), dict(source.state_dict()))
    assert report.new == report.dropped == ()
    other = create_model(ENCODER, num_classes=3).double()
    report = init_classifier(other, checkpoint)
    assert report.new == report.dropped == ("head.weight", "head.bias")
    assert torch.equal(other.norm.weight, source.norm.weight)


def test_drop_path_is_no_matter_of_weights():
    model = create_model(EncoderConfig((1, 2, 1, 1), (8, 16, 16, 24), drop_path_rate=0.3), num_classes=4)
    assert init_classifier(model, Checkpoint(fcmae().state_dict())).loaded


@pytest.mark.parametrize(
    "config",
    [
        EncoderConfig((1, 1, 1, 1), (8, 16, 16, 24)),
        EncoderConfig((1, 2, 1, 1), (8, 16, 16, 32)),
        EncoderConfig((1, 2, 1, 1), (8, 16, 16, 24), in_chans=1),
        EncoderConfig((1, 2, 1, 1), (8, 16, 16, 24), patch_size=16),
        EncoderConfig((1, 2, 1, 1), (8, 16, 16, 24), kernel_size=5),
    ],
)
def test_another_variant_is_refused_and_both_named(config):
    model = create_model(config, num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        init_classifier(model, Checkpoint(fcmae().state_dict()))
    assert describe(ENCODER) in str(caught.value)
    assert describe(config) in str(caught.value)
    assert same(before, dict(model.state_dict()))


# What is refused ---------------------------------------------------------------------------------------------------


def test_every_missing_encoder_tensor_is_an_error():
    for state in (fcmae().encoder.state_dict(), sparse_official(fcmae())):
        for name in state:
            with pytest.raises(CheckpointError):
                read_weights({key: value for key, value in state.items() if key != name})


@pytest.mark.parametrize("name", ["norm.weight", "norm.bias", "head.weight", "head.bias"])
def test_half_a_head_is_an_error(name):
    state = create_model(ENCODER, num_classes=3).state_dict()
    with pytest.raises(CheckpointError, match="incomplete"):
        read_weights({key: value for key, value in state.items() if key != name})


def test_norm_without_head_is_allowed():
    state = create_model(ENCODER, num_classes=0).state_dict()
    assert infer_config(state) == ClassifierConfig(ENCODER, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_weights_are_refused(value):
    state = fcmae().state_dict()
    state["encoder.stages.1.0.pwconv1.bias"][3] = value
    with pytest.raises(CheckpointError, match=r"stages\.1\.0\.pwconv1\.bias holds NaN or infinity"):
        read_weights(state)


def test_other_networks_are_refused():
    import timm
    from timm.models.convnext import ConvNeXt

    with pytest.raises(CheckpointError, match=r"not the weights of a ConvNeXt V2.*bn1"):
        read_weights(timm.create_model("resnet10t").state_dict())
    first_version = ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4))
    with pytest.raises(CheckpointError, match="ConvNeXt V1"):
        read_weights(first_version.state_dict())
    state = {**fcmae().encoder.state_dict(), "extra.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match="extra"):
        read_weights(state)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stages.0.0.norm.weight", torch.ones(9), "shape"),
        ("stages.0.0.pwconv1.weight", torch.ones(32, 8, dtype=torch.int8), "quantised"),
        ("downsample_layers.0.0.weight", torch.ones(8, 3, 5, 5), "patch_size"),
        ("downsample_layers.0.0.weight", torch.ones(8, 48), "4 axes"),
        ("downsample_layers.0.0.weight", torch.ones(8, 3, 4, 2), "patch_size|shape"),
    ],
)
def test_wrong_shapes_and_types(name, value, message):
    with pytest.raises(CheckpointError, match=message):
        read_weights({**fcmae().encoder.state_dict(), name: value})


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


def test_incomplete_decoder():
    state = fcmae().state_dict()
    for gone in ("mask_token", "pred.bias", "decoder.1.grn.beta"):
        with pytest.raises(CheckpointError, match="incomplete"):
            read_weights({key: value for key, value in state.items() if key != gone})


def test_errors_name_the_file(tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"conv1.weight": torch.ones(1)}, None)
    for function in (encoder_state_dict, load_model, lambda path: init_classifier(create_model(ENCODER), path)):
        with pytest.raises(CheckpointError, match=r"a\.pth: not the weights"):
            function(tmp_path / "a.pth")


def test_every_tensor_has_a_name_of_its_own_in_every_layout():
    names = {"encoder": list(Encoder(ENCODER).state_dict()), "head": ["norm.weight", "norm.bias", "head.weight"]}
    for layout in layouts.LAYOUTS:
        foreign = [layouts.foreign_name(name, layout) for name in itertools.chain(*names.values())]
        assert len(set(foreign)) == len(foreign)

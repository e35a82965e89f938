"""What the converter writes is loaded as it says, by the calls that it prints, in the networks that users have."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from weights_helpers import fcmae, randomise, same, sparse_official

import convnextv2.timm  # noqa: F401  # registers the models that are named
from convnextv2 import VARIANTS, EncoderConfig, create_fcmae, create_model
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import ClassifierConfig, encoder_config
from convnextv2.weights import layouts, verify
from convnextv2.weights.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from convnextv2.weights.evaluators import official_dense_features, timm_network
from convnextv2.weights.loaders import load_timm, timm_model
from convnextv2.weights.loading import init_classifier, load_model
from convnextv2.weights.reading import read_weights, with_norm, write_layout
from convnextv2.weights.verify import verify_conversion

SMALL = EncoderConfig((1, 2, 1, 1), (8, 16, 16, 24))
NAMES = [f"convnextv2_{size}" for size in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")]
CONVOLUTIONS = NAMES[:4]
"""Timm's with 1×1 convolutions."""

Convert = Callable[..., list[str]]


@pytest.fixture
def convert(script, tmp_path, monkeypatch) -> Convert:
    """Runs the converter in a folder of its own; returns the lines that it prints, from the last that tells what was
    written on."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> list[str]:
        done = script("convert_sparse_to_dense", *arguments)
        assert (done.status, done.err) == (0, "")
        lines = done.out.splitlines()
        return lines[next(i for i, line in enumerate(lines) if line.startswith("written: ")) + 1 :]

    return run


def parameters(model: nn.Module) -> nn.Module:
    """Random ones, of float32, and a scale at which logits are about 1."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 and "grn" not in name else 25
        parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan)
    return model.eval()


def pretrained(config: EncoderConfig, path: str = "run/checkpoints/last.safetensors") -> nn.Module:
    model = parameters(create_fcmae(config, img_size=2 * config.patch_size, decoder_dim=8, backend="reference"))
    save_checkpoint(path, model, model.config)
    return model


def classifier(config: EncoderConfig, classes: int, path: str = "classifier.safetensors") -> ConvNeXtV2:
    model = parameters(create_model(config, num_classes=classes))
    save_checkpoint(path, model, ClassifierConfig(config, classes))
    return model


def executed(line: str, **names: object) -> nn.Module:
    """What the text behind the colon, up to a remark, evaluates to."""
    text = line.partition(": ")[2].partition(", as it is without")[0]
    before, _, call = text.rpartition("; ")
    known = {"timm": timm, "torch": torch, "safetensors": safetensors, **names}
    exec(before, known)
    return eval(call, known)


def images(config: EncoderConfig) -> Tensor:
    side = 2 * config.patch_size
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, config.in_chans, side, side + config.patch_size, generator=generator)


@torch.no_grad()
def assert_same_outputs(theirs: nn.Module, ours: ConvNeXtV2, config: EncoderConfig) -> None:
    given = images(config)
    for actual, expected in (
        (theirs.eval()(given), ours(given)),
        (theirs.forward_features(given), ours.forward_features(given)),
    ):
        assert float((actual - expected).abs().max() / expected.abs().max()) <= 1e-5


INPUTS = [(3, 1000), (1, 0), (4, 1000), (4, 0)]
"""Channels and classes: of each variant two, a head and none; of 1×1 convolutions and of linear layers all."""


@pytest.mark.parametrize(
    ("name", "in_chans", "classes"), [(name, *INPUTS[(i + j) % 4]) for i, name in enumerate(NAMES) for j in (0, 1)]
)
def test_every_variant_has_timms_names_and_shapes(name, in_chans, classes):
    config = encoder_config(name, in_chans=in_chans)
    with torch.device("meta"):
        state = ConvNeXtV2(ClassifierConfig(config, classes)).state_dict()
    with init_empty_weights():
        theirs = timm.create_model(name, in_chans=in_chans, num_classes=classes).state_dict()
    if not classes:
        state = {key: value for key, value in state.items() if key.split(".")[0] != "norm"}
    written = write_layout(with_norm(read_weights(state)), "timm")
    assert {key: value.shape for key, value in written.items()} == {key: value.shape for key, value in theirs.items()}
    load_timm(written, config)


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_computes_in_timm_what_it_computes_here(convert, name):
    """The real depths; from base on with an eighth of the channels."""
    config = encoder_config(name)
    if name not in NAMES[:5]:
        config = replace(config, dims=tuple(dim // 8 for dim in config.dims))
    ours = classifier(config, 10)
    line, *more = convert("classifier.safetensors", "timm.pth", "--to", "timm")
    assert not more
    network = name if name in NAMES[:5] else "convnextv2_tiny"
    assert line.startswith(f"load it with: timm.create_model('{network}', ")
    assert ("depths=" in line) == (name not in NAMES[:5])
    assert_same_outputs(executed(line), ours, config)


@pytest.mark.parametrize(
    "config",
    [
        encoder_config("atto", in_chans=1),
        encoder_config("atto", in_chans=4, patch_size=8, kernel_size=5),
        replace(SMALL, in_chans=4),
        replace(SMALL, patch_size=8, kernel_size=3),
        EncoderConfig((1, 1, 1, 1), (4, 4, 4, 4), kernel_size=9),
    ],
)
@pytest.mark.parametrize(("suffix", "classes"), [(".pth", 0), (".safetensors", 3)])
def test_channels_patches_kernels_and_sizes(convert, config, suffix, classes):
    pretrained(config)
    head = ["--num-classes", classes] if classes else []
    (line,) = convert("run", f"t 'i' mm{suffix}", "--to", "timm", *head)
    theirs = executed(line)
    assert theirs.num_classes == classes
    convert("run", "dense.pth", "--num-classes", 3)
    ours = load_model("dense.pth").eval()
    if not classes:  # timm pools and norms
        ours = ConvNeXtV2(ClassifierConfig(config, 0)).eval()
        init_classifier(ours, "dense.pth")
    assert_same_outputs(theirs, ours, config)


def test_a_variant_that_timm_does_not_know(convert, monkeypatch):
    monkeypatch.setitem(VARIANTS, "convnextv2_zepto", ((1, 1, 2, 1), (16, 32, 64, 128)))
    config = encoder_config("zepto")
    ours = classifier(config, 2)
    (line,) = convert("classifier.safetensors", "timm.pth", "--to", "timm")
    assert "'convnextv2_tiny', depths=(1, 1, 2, 1), dims=(16, 32, 64, 128)" in line
    assert_same_outputs(executed(line), ours, config)


def test_a_variant_with_the_name_of_another_of_timms(convert, monkeypatch):
    monkeypatch.setitem(VARIANTS, "convnextv2_small", ((1, 1, 1, 2), (8, 8, 16, 16)))
    config = encoder_config("small")
    ours = classifier(config, 2)
    (line,) = convert("classifier.safetensors", "timm.pth", "--to", "timm")
    assert "dims=(8, 8, 16, 16)" in line
    assert_same_outputs(executed(line), ours, config)
    assert timm_model(replace(config, depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)))[1].keys() == {"depths", "dims"}


@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
def test_patch_size_16_is_refused_before_anything_is_written(script, tmp_path, monkeypatch, verify):
    monkeypatch.chdir(tmp_path)
    pretrained(replace(SMALL, patch_size=16))
    done = script("convert_sparse_to_dense", "run", "timm.pth", "--to", "timm", verify)
    assert (done.status, done.out) == (2, "")
    assert re.fullmatch(
        r"error: run/\S+: timm has no .*\(patch size 16\); official-dense and sparse-official hold any.*\n", done.err
    )
    assert not Path("timm.pth").exists()


def test_the_norm_that_timm_has_always_is_told(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrained(SMALL)
    out = script("convert_sparse_to_dense", "run", "timm.pth", "--to", "timm").out
    assert "\nnew, freshly initialised: final norm (2 tensors)\n" in out
    assert "\nnew, left to fine-tuning (not in the file): head (2 tensors)\n" in out
    state = load_checkpoint("timm.pth").state_dict
    assert state["head.norm.weight"].eq(1).all()
    assert state["head.norm.bias"].eq(0).all()
    assert load_checkpoint("timm.pth").config == ClassifierConfig(SMALL, 0)
    classifier(SMALL, 3)
    out = script("convert_sparse_to_dense", "classifier.safetensors", "timm.pth", "--to", "timm").out
    assert "\nnew, freshly initialised: nothing\n" in out


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_tiny"])
def test_round_trip_leaves_the_encoder_as_it_was(convert, name):
    """Both kinds; narrowed in depth alone, which ``timm`` then is told."""
    config = replace(encoder_config(name), depths=(1, 1, 1, 1)) if name == "convnextv2_tiny" else encoder_config(name)
    ours = pretrained(config)
    convert("run", "timm.safetensors", "--to", "timm")
    convert("timm.safetensors", "back.safetensors")
    back = load_checkpoint("back.safetensors").state_dict
    assert same({key: value for key, value in back.items() if not key.startswith("norm.")}, ours.encoder.state_dict())


@pytest.mark.parametrize("kind", ["official-sparse", "official-dense", "transformers"])
def test_files_of_others_go_to_timm(convert, kind):
    config = encoder_config("atto")
    if kind == "transformers":
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        settings = {"depths": list(config.depths), "hidden_sizes": list(config.dims), "num_labels": 4}
        source = transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**settings))
        state = parameters(source).state_dict()
    elif kind == "official-dense":
        state = parameters(create_model(config, num_classes=4)).state_dict()
    else:
        state = sparse_official(parameters(create_fcmae(config, img_size=64, decoder_dim=8)))
    torch.save({"model": state}, "source.pt")
    (line,) = convert("source.pt", "timm.pth", "--to", "timm")
    ours = create_model(config, num_classes=0 if kind == "official-sparse" else 4).eval()
    init_classifier(ours, "source.pt")
    assert_same_outputs(executed(line), ours, config)


def of_the_other_kind(state: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = {key: value for key, value in state.items() if re.search(r"\.mlp\.fc\d\.weight$", key)}
    return state | {key: v.flatten(1) if v.dim() == 4 else v[:, :, None, None] for key, v in layers.items()}


@pytest.mark.parametrize("config", [encoder_config("atto"), SMALL])
def test_files_of_either_kind_are_read_and_one_is_written(config):
    """Earlier versions wrote linear layers for every variant."""
    state = randomise(create_model(config, num_classes=2)).state_dict()
    right = write_layout(read_weights(state), "timm")
    other = of_the_other_kind(right)
    headless = {key: value for key, value in other.items() if not key.startswith("head.")}
    for source in (right, other, headless):
        dense = write_layout(read_weights(source), "official-dense")
        assert verify_conversion(source, dense).passed
        assert verify_conversion(source, written := write_layout(with_norm(read_weights(source)), "timm")).passed
        assert same({key: written[key] for key in source}, {key: right[key] for key in source})
    assert verify_conversion(state, right).whose == ("official-dense", "timm")
    with pytest.raises(CheckpointError, match=r"timm's convnextv2_\w+ does not take the weights.*size mismatch"):
        verify_conversion(state, other)


@pytest.mark.parametrize("missing", ["head.norm.weight", "head.fc.bias", "stages.2.blocks.0.mlp.grn.bias"])
def test_a_missing_tensor_of_the_head_is_not_passed_over(missing):
    state = write_layout(read_weights(randomise(create_model(SMALL, num_classes=2)).state_dict()), "timm")
    timm_loading = layouts.get_layout("timm").loading
    assert timm_loading(state, SMALL, "a.pth")
    del state[missing]
    with pytest.raises(CheckpointError, match=rf"does not take the weights: .*Missing.*{missing}"):
        timm_loading(state, SMALL, "a.pth")


@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
@pytest.mark.parametrize(
    "change",
    [
        {"write": lambda name, tensor, config: tensor.flatten() if ".grn." in name else tensor},  # as it was for atto
        {"norm": False},
        {"names": ((r"^downsample_layers\.0\.", "stem."), (r"^stem\.0\.bias$", "stem.0.shift"))},
    ],
)
def test_what_timm_would_not_take_is_not_written(script, tmp_path, monkeypatch, change, verify):
    monkeypatch.chdir(tmp_path)
    pretrained(encoder_config("atto"))
    own = layouts.get_layout("timm")
    names = (*own.names, *change.get("names", ()))
    monkeypatch.setitem(layouts.LAYOUTS, "timm", replace(own, **{**change, "names": names}))
    done = script("convert_sparse_to_dense", "run", "timm.pth", "--to", "timm", verify)
    assert (done.status, done.out) == (2, "")
    assert re.match(r"error: run/\S+: timm's convnextv2_atto does not take the weights: .*\n$", done.err)
    assert not Path("timm.pth").exists()


def test_verification_in_python_wants_what_timm_takes():
    state = fcmae().state_dict()
    with pytest.raises(CheckpointError, match=r"Missing key.*head\.norm"):
        verify_conversion(state, write_layout(read_weights(state), "timm"))
    assert verify_conversion(state, write_layout(with_norm(read_weights(state)), "timm")).passed


@pytest.mark.slow
def test_in_a_fresh_process_and_for_features(convert):
    """``features_only`` renames the layers, so timm takes such files as it takes its own: as pre-trained weights."""
    ours = classifier(encoder_config("atto"), 5)
    (line,) = convert("classifier.safetensors", "timm.safetensors", "--to", "timm")
    call = line.removeprefix("load it with: ")
    program = (
        f"import timm, torch; model = {call}.eval(); images = torch.ones(1, 3, 64, 64); "
        "features = timm.create_model('convnextv2_atto', features_only=True, pretrained=True, "
        "pretrained_cfg_overlay={'file': 'timm.safetensors'}).eval(); "
        "torch.save([model(images), *features(images)], 'outputs.pt')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    logits, *features = torch.load("outputs.pt")
    with torch.no_grad():
        expected = ours(torch.ones(1, 3, 64, 64))
        last = ours.forward_features(torch.ones(1, 3, 64, 64))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features[-1], last, rtol=1e-5, atol=1e-5)
    assert [feature.shape[1] for feature in features] == [40, 80, 160, 320]


@pytest.mark.parametrize(("patch_size", "in_chans", "kernel_size"), [(32, 3, 7), (16, 1, 5), (8, 5, 3)])
def test_the_independent_dense_evaluator_is_the_dense_network(patch_size, in_chans, kernel_size):
    config = EncoderConfig((1, 1, 2, 1), (4, 6, 5, 8), in_chans, patch_size, kernel_size)
    model = randomise(create_model(config, num_classes=2))
    given = images(config).double()
    with torch.no_grad():
        expected = model.forward_features(given)
    actual = official_dense_features(model.state_dict(), config, given)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    if patch_size != 16:
        theirs = timm_network(write_layout(read_weights(model.state_dict()), "timm"), config).forward_features(given)
        torch.testing.assert_close(theirs, actual, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_official_dense_files_are_verified_by_a_network_of_their_own(monkeypatch):
    """What the sparse and the dense encoder of ours would do alike is seen."""
    state = fcmae().state_dict()
    right = verify._encoder

    def wrong(weights):
        encoder = right(weights)
        grn = encoder.stages[0][0].grn
        grn.gamma = nn.Parameter(grn.gamma * 1.001)  # not in place: the numbers are the state's
        return encoder

    monkeypatch.setattr(verify, "_encoder", wrong)
    verification = verify_conversion(state, write_layout(read_weights(state), "official-dense"))
    assert verification.whose == ("official-dense",)
    assert verification.masked < 1e-13 > verification.unmasked
    assert verification.foreign > verify.TOLERANCE
    assert not verification.passed


def official_finetuning(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ``main_finetune.py --finetune`` of the official repository makes of the names and shapes of a file."""
    dropped = ("decoder", "mask_token", "proj", "pred")
    result: dict[str, Tensor] = {}
    for name, value in checkpoint.items():
        if any(part in name for part in dropped):
            continue
        name = name.partition(".")[2] if name.startswith("encoder") else name
        if name.endswith("kernel"):
            side = int(math.sqrt(value.shape[0]))
            turned = value.permute(*reversed(range(value.dim())))
            shape = (value.shape[-1], 1 if value.dim() == 2 else value.shape[1], side, side)
            result[name.removesuffix("kernel") + "weight"] = turned.reshape(shape).transpose(3, 2)
            continue
        parts = name.split(".")
        if "ln" in name or "linear" in name:
            parts.pop(-2)
        result[".".join(parts)] = value
    for name, value in result.items():
        if name.endswith("bias") and value.dim() != 1:
            result[name] = value.reshape(-1)
        elif "grn" in name:
            result[name] = value.unsqueeze(0).unsqueeze(1)
    return result


def test_official_sparse_files_go_through_the_official_fine_tuning_script(convert):
    ours = pretrained(SMALL)
    first, official, script_line = convert("run", "sparse.pth", "--to", "sparse-official")
    whole = executed(first)
    assert same(whole.state_dict(), ours.state_dict())
    names = ours.state_dict().keys()
    written = torch.load("sparse.pth")["model"]
    assert written.keys() == sparse_official(ours).keys()
    assert "strict=False" not in official
    assert script_line == "or with main_finetune.py --finetune sparse.pth"
    loaded = official_finetuning(written)
    assert same(loaded, ours.encoder.state_dict())
    assert len(names) > len(loaded)


def test_official_dense_files_lose_their_grn_there_and_the_converter_says_so(convert):
    ours = pretrained(SMALL)
    first, official, advice = convert("run", "dense.pth")
    loaded = official_finetuning(torch.load("dense.pth")["model"])
    different = {key for key, value in ours.encoder.state_dict().items() if value.shape != loaded[key].shape}
    assert different
    assert all(".grn." in key for key in different)
    assert advice.endswith("which drops the GRN of dense files: use --to sparse-official")
    assert official.endswith(", strict=False), as it is without norm and head")
    model = create_model(SMALL, num_classes=3)
    report = executed(official, model=model)
    assert set(report.missing_keys) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert not report.unexpected_keys
    assert same({key: model.state_dict()[key] for key in loaded}, ours.encoder.state_dict())
    other = create_model(SMALL, num_classes=3)
    assert set(executed(first, model=other).new) == set(report.missing_keys)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_whole_official_files_load_strictly(convert, suffix):
    ours = classifier(SMALL, 3)
    first, official, _ = convert("classifier.safetensors", f"dense{suffix}")
    assert "strict" not in official
    for model in (executed(first), create_model(SMALL, num_classes=3)):
        assert not any(executed(official, model=model))
        assert same(model.state_dict(), ours.state_dict())


@pytest.mark.parametrize("config", [replace(SMALL, patch_size=16), replace(SMALL, kernel_size=5)])
@pytest.mark.parametrize("to", ["official-dense", "sparse-official"])
def test_what_the_official_networks_do_not_have_is_told(convert, config, to):
    ours = pretrained(config)
    first, second = convert("run", "out.safetensors", "--to", to)
    assert "the official networks do not take it: they have patch size 32 and kernel size 7 alone" in second
    timms = executed(second.replace("timm's do, with import convnextv2.timm: ", ": ").partition("alone; ")[2])
    assert torch.equal(timms.stem[0].weight, ours.encoder.downsample_layers[0][0].weight)
    model = create_model(config, num_classes=2)
    executed(first, model=model)
    if to == "official-dense":
        assert same({key: model.state_dict()[key] for key in ours.encoder.state_dict()}, ours.encoder.state_dict())


def test_what_went_down_a_stream_has_no_name(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrained(SMALL)
    os.mkfifo("pipe")
    reader = threading.Thread(target=lambda: Path("timm.safetensors").write_bytes(Path("pipe").read_bytes()))
    reader.start()
    done = script("convert_sparse_to_dense", "run", "pipe", "--to", "timm")
    reader.join()
    assert "checkpoint_path='FILE.safetensors')" in done.err
    assert load_checkpoint("timm.safetensors").metadata["layout"] == "timm"

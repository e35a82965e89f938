"""Ours to every other project and back: the same bits, for all variants at narrow widths and every patch size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
import transformers
from accelerate import init_empty_weights
from weights_helpers import same

import convnextv2.timm  # noqa: F401  # registers names
from convnextv2 import VARIANTS, ClassifierConfig, ConvNeXtV2, EncoderConfig, FCMAEConfig
from convnextv2.export import export, source_of
from convnextv2.models.fcmae import FCMAE
from convnextv2.weights import (
    CheckpointError,
    load_checkpoint,
    read_checkpoint,
    read_weights,
    save_checkpoint,
    write_layout,
)
from convnextv2.weights.layouts import LAYOUTS

State = dict[str, torch.Tensor]
PATCHES = [("convnextv2_atto", 16), ("convnextv2_atto", 8)]
ALL = pytest.mark.parametrize(("variant", "patch_size"), [*((variant, 32) for variant in VARIANTS), *PATCHES])
DEPTHS = [(f"convnextv2_{size}", 32) for size in ("atto", "nano", "tiny", "base")]
SOME = pytest.mark.parametrize(("variant", "patch_size"), [*DEPTHS, *PATCHES])
"""The patch size is the stem's alone: one variant at the smaller ones. Some: all depths that there are."""


def narrow(variant: str, patch_size: int) -> EncoderConfig:
    """A variant of an eighth of its width."""
    depths, dims = VARIANTS[variant]
    return EncoderConfig(depths, tuple(dim // 8 for dim in dims), patch_size=patch_size)  # type: ignore[arg-type]


def drawn(shapes: dict[str, torch.Size]) -> State:
    """Numbers of every size for each tensor, denormal ones and both zeros among them."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * torch.pow(
            10.0, torch.randint(-6, 6, shape, generator=generator)
        )
        value.view(-1)[:2] = torch.tensor([1e-42, -0.0])
        found[name] = value
    return found


def classifier(config: EncoderConfig) -> State:
    with torch.device("meta"):
        model = ConvNeXtV2(ClassifierConfig(config, 5))
    return drawn({name: value.shape for name, value in model.state_dict().items()})


def bits(state: State) -> State:
    return {name: value.view(torch.int32) for name, value in state.items()}


def assert_back(written: State, ours: State, path: Path, parts: tuple[str, ...]) -> None:
    """A file of what was written holds ``ours``, but for the parts that it has not."""
    save_checkpoint(path, written, None)
    back = dict(read_checkpoint(load_checkpoint(path)))
    kept = {name: value for name, value in ours.items() if name in back}
    gone = {name.split(".")[0] for name in ours.keys() - kept.keys()}
    assert gone == (set() if "head" in parts else {"norm", "head"})
    assert same(bits(back), bits(kept))


@ALL
def test_through_a_file_of_every_layout(variant: str, patch_size: int, tmp_path: Path) -> None:
    ours = classifier(narrow(variant, patch_size))
    for layout in LAYOUTS.values():
        if (layout.name, patch_size) == ("timm", 16):  # what it has not; those that we register are below
            with pytest.raises(CheckpointError, match="timm has no ConvNeXt with a stem of stride 2"):
                write_layout(read_weights(ours), layout.name)
            continue
        written = write_layout(read_weights(ours), layout.name)
        assert_back(written, ours, tmp_path / f"{layout.name}.safetensors", layout.parts)


@SOME
def test_with_its_decoder(variant: str, patch_size: int, tmp_path: Path) -> None:
    config = FCMAEConfig(narrow(variant, patch_size), decoder_dim=16)
    with torch.device("meta"):
        model = FCMAE(config)
    ours = drawn({name: value.shape for name, value in model.state_dict().items()})
    for layout in ("fcmae", "sparse-official"):
        save_checkpoint(tmp_path / "a.pth", write_layout(read_weights(ours), layout), None)
        back = write_layout(read_checkpoint(load_checkpoint(tmp_path / "a.pth")), "fcmae")
        assert same(bits(back), bits(ours))


@SOME
def test_through_the_networks_of_timm(variant: str, patch_size: int, tmp_path: Path) -> None:
    """Its own, where it has one (linear at these widths), and those that we register (1×1 convolutions in some)."""
    config = narrow(variant, patch_size)
    ours = classifier(config)
    shape: dict[str, Any] = {"depths": config.depths, "dims": config.dims, "num_classes": 5}
    names = {f"fcmae_{variant}": patch_size} | ({"convnextv2_tiny": patch_size // 8} if patch_size != 16 else {})
    for name, size in names.items():
        with init_empty_weights():
            model = timm.create_model(name, **shape, patch_size=size)
        given = ours if name != "convnextv2_tiny" else write_layout(read_weights(ours), "timm")
        model.load_state_dict(given, strict=True, assign=True)
        assert_back(dict(model.state_dict()), ours, tmp_path / f"{name}.safetensors", ("head",))


@SOME
def test_through_the_network_of_transformers(variant: str, patch_size: int, tmp_path: Path) -> None:
    config = narrow(variant, patch_size)
    ours = classifier(config)
    shape = {"depths": list(config.depths), "hidden_sizes": list(config.dims), "patch_size": patch_size // 8}
    with init_empty_weights():
        model = transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(**shape, num_labels=5))
    model.load_state_dict(write_layout(read_weights(ours), "transformers"), strict=True, assign=True)
    model.save_pretrained(tmp_path / "folder")
    assert same(bits(dict(read_checkpoint(load_checkpoint(tmp_path / "folder")))), bits(ours))


@pytest.mark.slow
def test_what_onnx_and_torch_export_hold(tmp_path: Path) -> None:
    """Neither is read back as weights; the numbers in them are ours nevertheless."""
    config = replace(narrow("convnextv2_atto", 16), depths=(1, 1, 1, 1))
    ours = classifier(config)
    save_checkpoint(tmp_path / "a.safetensors", ours, ClassifierConfig(config, 5))
    source = source_of(load_checkpoint(tmp_path / "a.safetensors"))
    export(source, "torch-export", tmp_path / "a.pt2", check=False)
    held = torch.export.load(tmp_path / "a.pt2").state_dict
    assert same(bits({name: held[name].detach() for name in ours}), bits(ours))
    export(source, "onnx", tmp_path / "a.onnx", check=False)
    found = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(tmp_path / "a.onnx").graph.initializer}
    numbers = {
        np.sort(value.view(np.int32), axis=None).tobytes() for value in found.values() if value.dtype == np.float32
    }
    for name, value in ours.items():
        wanted = np.sort(value.numpy().view(np.int32), axis=None).tobytes()
        assert wanted in numbers, name

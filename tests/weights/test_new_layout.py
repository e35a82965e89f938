"""A new layout is one file: the example of docs/checkpoints.md, registered by a program and put into the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from weights_helpers import ENCODER, fcmae, same, sparse_official

from convnextv2 import create_model
from convnextv2.weights import layouts
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from convnextv2.weights.evaluators import timm_network
from convnextv2.weights.layout import Layout
from convnextv2.weights.layouts import detect_layout, get_layout, register_layout
from convnextv2.weights.loading import init_classifier
from convnextv2.weights.reading import read_checkpoint, read_weights, write_layout
from convnextv2.weights.verify import verify_conversion

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")


def example() -> str:
    found = re.search(r"^## Adding a layout\n.*?^```python\n(.*?)^```$", GUIDE, re.M | re.S)
    assert found is not None
    return found[1]


@pytest.fixture
def detector() -> Iterator[Layout]:
    names: dict[str, Layout] = {}
    exec(compile(example(), "docs/checkpoints.md", "exec"), names)
    register_layout(names["LAYOUT"])
    yield names["LAYOUT"]
    del layouts.LAYOUTS["detector"]


def by_hand(model) -> dict[str, torch.Tensor]:
    state = {f"backbone.{name}": value for name, value in model.encoder.state_dict().items()}
    for name in state:
        if re.search(r"pwconv[12]\.weight$", name):
            state[name] = state[name].reshape(*state[name].shape, 1, 1)
    return state


def test_a_registered_layout_is_read_written_verified_and_started_from(detector):
    model = fcmae()
    state = by_hand(model)
    assert state["backbone.stages.0.0.pwconv1.weight"].shape == (32, 8, 1, 1)
    assert [layout.name for layout in layouts.LAYOUTS.values() if layout.recognises(state.keys())] == ["detector"]
    weights = read_weights(state)
    assert (weights.layout, weights.config) == ("detector", ENCODER)
    dense = write_layout(weights, "official-dense")
    assert same(dense, model.encoder.state_dict())
    assert same(write_layout(read_weights(model.state_dict()), "detector"), state)
    for source, written in ((state, dense), (sparse_official(model), state), (state, sparse_official(model))):
        assert verify_conversion(source, written).largest < 1e-13
    classifier = create_model(ENCODER, num_classes=2).double()
    assert len(init_classifier(classifier, Checkpoint(state)).loaded) == len(state)


def test_a_wrong_write_is_caught(detector, monkeypatch):
    wrong = replace(detector, write=lambda name, tensor, config: tensor.flip(-1) if ".dwconv.w" in name else tensor)
    monkeypatch.setitem(layouts.LAYOUTS, "detector", wrong)
    source = sparse_official(fcmae())
    assert not verify_conversion(source, write_layout(read_weights(source), "detector")).passed


def test_a_network_of_its_own_has_a_say(detector, monkeypatch):
    state = by_hand(fcmae())

    def verified_with(network):
        monkeypatch.setitem(layouts.LAYOUTS, "detector", replace(detector, dense_features=network))
        return verify_conversion(state, write_layout(read_weights(state), "official-dense"))

    def right(state_dict, config, images):
        return timm_network(write_layout(read_weights(state_dict), "timm"), config).forward_features(images)

    verification = verified_with(right)
    assert verification.passed
    assert verification.foreign is not None
    assert "detector's network" in str(verification)
    for wrong in (
        lambda *given: right(*given) + 1e-6,
        lambda *given: right(*given)[:, :, :2],
        lambda *given: right(*given) * float("nan"),
    ):
        assert not verified_with(wrong).passed


def test_names_are_taken_once(detector):
    with pytest.raises(ValueError, match="there is a layout 'detector' already"):
        register_layout(detector)
    with pytest.raises(ValueError, match=r"unknown layout 'detectron'; choose one of .*official-dense.*detector"):
        get_layout("detectron")
    with pytest.raises(CheckpointError, match=r"none of the layouts .*detector has names like"):
        detect_layout({"conv1.weight": torch.ones(1)})


def test_one_file_in_the_package_is_all(tmp_path):
    for folder in ("convnextv2", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "convnextv2" / "weights" / "layouts" / "detector.py").write_text(example())
    model = fcmae()
    save_checkpoint(tmp_path / "source.safetensors", model, model.config)

    def convert(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "scripts/convert_sparse_to_dense.py", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = convert("source.safetensors", "detector.safetensors", "--to", "detector")
    assert "mapped to detector:" in said
    assert "verified: largest relative error" in said
    assert same(load_file(tmp_path / "detector.safetensors"), by_hand(model))
    # Where that layout is not known it is our encoder below a prefix.
    assert read_checkpoint(load_checkpoint(tmp_path / "detector.safetensors")).config == ENCODER
    assert "layout detector, a custom ConvNeXt V2" in convert("detector.safetensors", "dense.safetensors")
    assert same(load_checkpoint(tmp_path / "dense.safetensors").state_dict, model.encoder.state_dict())
    assert "{detector,official-dense,sparse-official,timm," in re.sub(r"\s", "", convert("--help"))

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convnextv2 import EncoderConfig, create_fcmae, create_model
from convnextv2.evaluation import load_encoder
from convnextv2.weights import Weights, read_weights, with_norm, write_layout
from convnextv2.weights.checkpoint import CheckpointError, save_checkpoint

METADATA = {"img_size": [48, 64], "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 2.0]}


@pytest.fixture
def fcmae() -> Any:
    encoder = EncoderConfig((1, 1, 1, 1), (8, 16, 16, 24), patch_size=32)
    return create_fcmae(encoder, img_size=(64, 96), decoder_dim=16).eval()


def test_encoders_of_every_layout_are_the_same(fcmae: Any, tmp_path: Path) -> None:
    weights: Weights = read_weights(fcmae.state_dict())
    dense = read_weights(write_layout(weights, "official-dense"))
    states = {name: write_layout(weights, name) for name in ("fcmae", "official-dense", "sparse-official")}
    states |= {name: write_layout(with_norm(dense), name) for name in ("timm", "transformers")}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = fcmae.encoder(images)
        for name, state in states.items():
            save_checkpoint(tmp_path / f"{name}.pth", state, None)
            frozen = load_encoder(tmp_path / f"{name}.pth")
            assert torch.equal(frozen.model(images), expected), name
            assert not frozen.model.training
            assert frozen.img_size == (224, 224)
            assert frozen.mean == (0.485, 0.456, 0.406)


def test_what_our_checkpoints_say_of_their_images(fcmae: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "runs/checkpoints/last.safetensors", fcmae, fcmae.config)
    assert load_encoder(tmp_path / "runs").img_size == (64, 96)
    classifier = create_model(fcmae.config.encoder, num_classes=3)
    save_checkpoint(tmp_path / "a.pth", classifier, classifier.config, METADATA)
    frozen = load_encoder(tmp_path / "a.pth")
    assert (frozen.mean, frozen.std, frozen.img_size) == ((0.1, 0.2, 0.3), (1.0, 1.0, 2.0), (48, 64))
    assert load_encoder(tmp_path / "a.pth", img_size=(33, 40)).img_size == (33, 40)
    with pytest.raises(ValueError, match="smaller than the patch size 32"):
        load_encoder(tmp_path / "a.pth", img_size=(31, 40))
    with pytest.raises(CheckpointError, match="no such file"):
        load_encoder(tmp_path / "b.pth")


def test_untrained_weights_are_the_seeds(fcmae: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pth", fcmae, fcmae.config)
    state = torch.get_rng_state()
    first, again, other = (
        load_encoder(tmp_path / "a.pth", untrained=seed).model.state_dict()["stages.0.0.pwconv1.weight"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    trained = fcmae.encoder.state_dict()["stages.0.0.pwconv1.weight"]
    assert not torch.equal(first, other)
    assert not torch.equal(first, trained)
    assert float(first.std()) == pytest.approx(0.02, rel=0.2)


def test_parts_are_those_of_a_fine_tuning(fcmae: Any, tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    from convnextv2.training.finetuning import ClassifierTask, FinetuneOptions

    save_checkpoint(tmp_path / "a.pth", fcmae, fcmae.config, METADATA)
    root = image_folder({"a": 10, "b": 10})
    options = FinetuneOptions(data=root, output="run", init=tmp_path / "a.pth", seed=5, val_fraction=0.3)
    task = ClassifierTask(options)
    task.resolve(None)
    frozen = load_encoder(tmp_path / "a.pth")
    for mine, theirs in zip(frozen.datasets(root, seed=5, val_fraction=0.3), task.data(), strict=True):
        assert mine.source.numbers == theirs.source.numbers  # type: ignore[attr-defined]
        assert torch.equal(mine.examples(3), theirs.examples(3))
    assert mine.source.numbers != frozen.datasets(root, val_fraction=0.3)[1].source.numbers  # type: ignore[attr-defined]

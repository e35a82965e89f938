"""Runs that recompute their blocks: the same runs, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from train_helpers import finetune_options, make_images, pretrain_options, weights

from convnextv2.models.encoder import Block
from convnextv2.models.recomputing import FLAG
from convnextv2.training import finetune, pretrain


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set", count=4)


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("train_loss")) for row in rows]


def assert_same_run(plain: Path, recomputing: Path) -> None:
    assert losses(plain) == losses(recomputing)
    assert losses(plain)[-1] != losses(plain)[0]
    before, after = weights(plain), weights(recomputing)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("start", "options_of", "changes"),
    [
        (pretrain, pretrain_options, {"backend": "reference"}),
        (pretrain, pretrain_options, {"backend": "auto", "precision": "bf16"}),
        (finetune, finetune_options, {"backend": "torch", "mixup": 0.8, "ema_decay": 0.9}),
    ],
)
def test_the_same_losses_and_weights(
    images: Path, tmp_path: Path, start: Any, options_of: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]
    original = Block.forward

    def forward(self: Block, *given: Any) -> Any:
        calls[-1] += torch.is_grad_enabled()
        return original(self, *given)

    monkeypatch.setattr(Block, "forward", forward)
    shared = {"drop_path": 0.4, "accum": 2, "batch_size": 2, "lr": 1e-3, "warmup_epochs": 0, **changes}
    start(options_of(images, tmp_path / "plain", **shared))
    calls.append(0)
    result = start(options_of(images, tmp_path / "again", grad_checkpointing=True, **shared))
    assert_same_run(tmp_path / "plain", tmp_path / "again")
    assert calls[1] > 1.5 * calls[0] > 0
    assert "grad_checkpointing: true" in (tmp_path / "again" / "config.yaml").read_text()
    assert any(getattr(module, FLAG, False) for module in result.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "more"), [("pretrain", "--decoder-dim 16 --backend cpu --probe none"), ("finetune", "")]
)
def test_in_several_processes_and_in_shards(images: Path, tmp_path: Path, script: str, more: str) -> None:
    shared = *launching.TINY, *more.split(), "--data", images, "--batch-size", 2, "--epochs", 2, "--drop-path", 0.3
    for name, given in {
        "plain": [],
        "again": ["--grad-checkpointing"],
        "shards": ["--grad-checkpointing", "--sharding", "full"],
    }.items():
        launching.run(2, script, *shared, "--output", tmp_path / name, *given)
    assert_same_run(tmp_path / "plain", tmp_path / "again")
    assert losses(tmp_path / "shards") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_what_cannot_be_recomputed_is_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`grad_checkpointing`: between blocks the backend minkowski"):
        pretrain(pretrain_options(images, tmp_path / "run", backend="minkowski", grad_checkpointing=True))
    monkeypatch.setattr("convnextv2.models.recomputing.compiles_recomputing", lambda: False)
    with pytest.raises(ValueError, match="`grad_checkpointing` and `compile` exclude each other"):
        pretrain(pretrain_options(images, tmp_path / "run", compile="default", grad_checkpointing=True))
    assert not (tmp_path / "run").exists()

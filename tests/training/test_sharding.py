"""Shards: a run is the one that it is without them, and so are its files."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import launching
import pytest
import torch
from train_helpers import make_images, pretrain_options, weights

from convnextv2 import create_fcmae
from convnextv2.training import pretrain
from convnextv2.training.sharding import Sharding, without_weights
from sparse_ops.registry import registry

PRETRAIN = (
    *("--backend", "cpu", "--decoder-dim", "16", "--decoder-depth", "2", "--clip-grad", "0.05", "--batch-size", "4"),
    *("--reconstruct-every", "2", "--probe", "none"),
)
FINETUNE = "--ema-decay", "0.9", "--mixup", "0.8", "--accum", "2", "--batch-size", "2", "--head-start"
RATE = "--lr", "2e-3", "--schedule", "constant", "--warmup-epochs", "0"  # which no number of epochs changes
OF_THE_CLOCK = {"seconds", "images_per_s", "data_wait", "memory_mib", "probe_seconds", "knn_top1", "linear_top1"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set", count=17)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_close(mine: Any, theirs: Any, place: str = "state") -> None:
    """Nested dictionaries and lists of the same kind, with numbers that are close."""
    assert type(mine) is type(theirs), place
    if isinstance(mine, dict):
        assert list(mine) == list(theirs), place
        for name in mine:
            assert_close(mine[name], theirs[name], f"{place} {name}")
    elif isinstance(mine, list):
        assert len(mine) == len(theirs), place
        for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            assert_close(one, other, f"{place} {number}")
    elif isinstance(mine, torch.Tensor):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, msg=place)
    else:
        assert mine == (pytest.approx(theirs, rel=1e-6) if isinstance(mine, float) else theirs), place


def in_shards() -> None:
    """After an epoch each process looks at what it holds: weights and moments in shards, of each block too."""
    from convnextv2.models.encoder import Block
    from convnextv2.training.watching import Watch

    original = Watch.check_weights

    def check_weights(self: Any, step: int) -> None:
        original(self, step)
        states = self.optimizer.state.values()
        held = [self.parameters, *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))]
        for parts in held:
            assert len(parts) == len(self.parameters)
            mine = sum(part.to_local().untyped_storage().nbytes() for part in parts)
            whole = sum(4 * part.numel() for part in parts)
            assert 0.4 < mine / whole < 0.6, (mine, whole)

    Watch.check_weights = check_weights  # type: ignore[method-assign]
    original_forward = Block.forward

    def forward(self: Any, *given: Any) -> Any:
        assert not any(hasattr(parameter, "to_local") for parameter in self.parameters()), "gathered for the block"
        return original_forward(self, *given)

    Block.forward = forward  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "loss", "ways"), [
    ("pretrain", "loss", ("full", "none")), ("finetune", "train_loss", ("none", "full")),
])  # fmt: skip
def test_shards_make_the_run_that_there_is_without_them(
    images: Path, tmp_path: Path, script: str, loss: str, ways: tuple[str, str]
) -> None:
    """Losses, norms of gradients, features, weights and states, of a run that was resumed the other way."""
    own = PRETRAIN if script == "pretrain" else FINETUNE
    shared = *launching.TINY, *own, "--data", images, "--drop-path", 0.3, *RATE
    launching.run(2, script, *shared, "--output", tmp_path / "plain", "--epochs", 2)
    begun = *shared, "--output", tmp_path / "both"
    for epochs, way in enumerate(ways, 1):
        given = *begun, "--epochs", epochs, "--sharding", way, "--resume", "auto"
        look = in_shards if way == "full" else None
        done = [process.finish(240) for process in launching.processes(2, script, *given, before=look)]
        assert not [one.stderr for one in done if one.returncode]
    plain, both = rows(tmp_path / "plain"), rows(tmp_path / "both")
    assert plain[-1][loss] < plain[0][loss]
    assert [row["step"] for row in both] == [row["step"] for row in plain]
    for mine, theirs in zip(plain, both, strict=True):
        assert mine.keys() - theirs.keys() <= OF_THE_CLOCK
        for name in mine.keys() - OF_THE_CLOCK:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-6 if name == loss else 1e-4), name
    for file in ("last",) if script == "pretrain" else ("last", "best"):
        assert_close(weights(tmp_path / "plain", file), weights(tmp_path / "both", file))
    names = ["optimizer.bin"] if script == "pretrain" else ["optimizer.bin", "custom_checkpoint_0.pkl"]
    for name in names:
        files = [tmp_path / run / "checkpoints" / "state" / name for run in ("plain", "both")]
        assert_close(*(torch.load(file, weights_only=True) for file in files))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "this run has one; start several"),
        ({"sharding": "half"}, "`sharding` must be one of none, full"),
        ({"compile": "default"}, "`compile` default exclude each other"),
        ({"compile": "reduce-overhead"}, "`compile` reduce-overhead exclude each other"),
        ({"precision": "fp16"}, "use `precision` bf16"),
        ({"optimizer": "lamb"}, "use one of adamw, adam"),
    ],
)
def test_where_there_can_be_no_shards_one_line_says_so(
    images: Path, tmp_path: Path, changes: dict[str, str], reason: str
) -> None:
    options = pretrain_options(images, tmp_path / "run", **{"sharding": "full", **changes})
    with pytest.raises(ValueError, match=reason):
        pretrain(options)
    assert not (tmp_path / "run").exists()


def test_a_backend_with_features_of_its_own_is_refused() -> None:
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), mixed_precision="no")
    model = create_fcmae("convnextv2_atto", img_size=32, patch_size=16)
    model.backend = registry()["minkowski"]
    with pytest.raises(ValueError, match="the backend minkowski has features of a kind of its own"):
        Sharding(Namespace(sharding="full"), accelerator).prepare(model, torch.optim.AdamW(model.parameters()))


def test_a_copy_without_weights_is_the_network_otherwise() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    copy = without_weights(model)
    assert {(name, p.shape, p.requires_grad, p.device.type) for name, p in copy.named_parameters()} == {
        (name, p.shape, p.requires_grad, "meta") for name, p in model.named_parameters()
    }
    assert copy[1].running_mean.device.type == "cpu"
    copy.load_state_dict(model.state_dict(), assign=True)
    images = torch.randn(5, 3)
    torch.testing.assert_close(copy.eval()(images), model.eval()(images))
    assert not copy[0].bias.requires_grad

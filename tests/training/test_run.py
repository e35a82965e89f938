"""The skeleton under a task of its own, and the way in from Python."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from train_helpers import SMALL, finetune_options, make_images, pretrain_options, weights

from convnextv2 import FCMAE, ConvNeXtV2
from convnextv2.data.build import build_pretrain_dataset
from convnextv2.data.datasets import ImageDataset
from convnextv2.training import (
    FinetuneOptions,
    Metrics,
    PretrainOptions,
    RunResult,
    RunStoppedError,
    Task,
    finetune,
    linear_probe,
    pretrain,
    run_task,
)
from convnextv2.training.options import RunOptions
from convnextv2.training.reporting import reporters
from convnextv2.weights.loading import load_model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set")


@dataclass(frozen=True, kw_only=True)
class ColourOptions(RunOptions):
    blr: float = 1.0


@dataclass(frozen=True)
class ColourConfig:
    width: int = 4


class ColourNetwork(nn.Module):
    def __init__(self, config: ColourConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.Sequential(nn.Conv2d(3, config.width, 1), nn.Dropout(0.5), nn.Conv2d(config.width, 3, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).mean((2, 3))


class MeanColour(Task[ColourOptions]):
    """Predicts the mean colour of an image."""

    name = "mean-colour"

    def data(self) -> Sequence[ImageDataset]:
        return [build_pretrain_dataset(self.options.data, self.options.size)]

    def model(self) -> ColourNetwork:
        return ColourNetwork(ColourConfig())

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return (model(batch) - batch.mean((2, 3))).square().mean(), len(batch)


def test_a_task_needs_a_network_data_and_a_loss(images: Path, tmp_path: Path) -> None:
    def options(name: str, **changes: Any) -> ColourOptions:
        return ColourOptions(data=images, output=tmp_path / name, **{**SMALL, "epochs": 4, "lr": 0.05, **changes})

    def stop(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
        if description.startswith("epoch 3/"):
            signal.raise_signal(signal.SIGTERM)
        yield from items

    whole = run_task(MeanColour(options("whole")), RunResult)
    assert [row["epoch"] for row in whole.metrics] == [1, 2, 3, 4]
    assert whole.metrics[-1]["loss"] < 0.5 * whole.metrics[0]["loss"]
    assert whole.best is None
    assert whole.images == (15,)
    with pytest.raises(RunStoppedError, match=r"step 7 is saved \(epoch 3\), continue"):
        run_task(MeanColour(options("parts")), RunResult, progress=stop)
    lines: list[str] = []
    parts = run_task(MeanColour(options("parts", resume=True)), RunResult, log=lines.append)
    assert "resuming after epoch 2, at step 7" in lines
    assert [row["loss"] for row in parts.metrics] == [row["loss"] for row in whole.metrics]
    assert all(torch.equal(value, parts.model.state_dict()[name]) for name, value in whole.model.state_dict().items())
    assert not parts.model.training


def test_paths_and_one_number_for_a_square_become_what_a_recipe_holds(images: Path, tmp_path: Path) -> None:
    small = {**SMALL, "decoder_dim": 8, "backend": "reference", "epochs": 1, "reconstruct_every": 0}
    options = PretrainOptions(data=images, output=tmp_path / "run", **{**small, "img_size": 32, "betas": [0.9, 0.9]})
    assert (options.data, options.output, options.img_size) == (str(images), str(tmp_path / "run"), (32, 32))
    result = pretrain(options)
    recipe = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert recipe["data"] == str(images)
    assert recipe["img_size"] == [32, 32]
    assert recipe["betas"] == [0.9, 0.9]
    with pytest.raises(ValueError, match="is not a size in pixels"):
        replace(options, img_size=0)
    found = finetune(FinetuneOptions(data=images, output=tmp_path / "fin", init=result.folder, epochs=1, workers=0))
    assert found.images == (12, 3)


def test_a_run_returns_its_folder_its_metrics_and_its_network(images: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, float]] = []
    options = pretrain_options(images, tmp_path / "pre", epochs=1)
    pretrain(options)
    result = pretrain(replace(options, resume=True, epochs=2), on_loss=lambda *values: steps.append(values))
    assert result.folder == tmp_path / "pre"
    assert [row["epoch"] for row in result.metrics] == [1, 2]  # the first session's too
    assert (result.first_loss, result.last_loss) == tuple(row["loss"] for row in result.metrics)
    assert [step for step, _ in steps] == [3, 4, 5]
    assert sum(loss for _, loss in steps) / 3 == pytest.approx(result.last_loss, rel=1e-12)
    assert isinstance(result.model, FCMAE)
    assert len(repr(result)) < 300  # without the network
    assert all(torch.equal(value, weights(result.folder)[name]) for name, value in result.model.state_dict().items())

    probe = linear_probe(finetune_options(images, tmp_path / "probe", init=result.folder, lr=0.1))
    assert isinstance(probe.model, ConvNeXtV2)
    assert "linear_probe: true" in (probe.folder / "config.yaml").read_text()
    stem = "downsample_layers.0.0.weight"
    assert torch.equal(probe.model.state_dict()[stem], result.model.state_dict()[f"encoder.{stem}"])

    tuned = finetune(finetune_options(images, tmp_path / "fin", ema_decay=0.5, epochs=3, lr=1e-2))
    saved = load_model(tuned.folder).state_dict()  # averaged, of the best epoch
    assert all(torch.equal(value, saved[name]) for name, value in tuned.model.state_dict().items())
    assert (
        tuned.metrics[tuned.best_epoch - 1]["val_top1"] == tuned.best_top1 == max(r["val_top1"] for r in tuned.metrics)
    )


def test_runs_of_other_precision_follow_each_other_in_one_process(images: Path, tmp_path: Path) -> None:
    for number, precision in enumerate(("bf16", "no")):
        result = pretrain(pretrain_options(images, tmp_path / str(number), epochs=1, precision=precision))
        with torch.no_grad():
            pixels = result.model(torch.zeros(1, 3, 32, 32), torch.eye(4)[None]).pred
        assert pixels is not None
        assert pixels.dtype == torch.float32
        assert "autocast" not in str(result.model.forward)


def test_metrics_are_a_table() -> None:
    metrics = Metrics([{"epoch": 1, "loss": 0.123456}, {"epoch": 10, "loss": None, "a<b": "x"}])
    assert str(metrics).splitlines() == ["epoch    loss  a<b", "    1  0.1235     ", "   10            x"]
    shown = metrics._repr_html_()
    assert shown.count("<tr>") == 3
    assert "<th>a&lt;b</th>" in shown
    assert "<td>0.1235</td>" in shown
    assert metrics == [{"epoch": 1, "loss": 0.123456}, {"epoch": 10, "loss": None, "a<b": "x"}]


@pytest.mark.parametrize("place", ["notebook", "terminal", "neither"])
def test_a_run_shows_itself_where_somebody_looks(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    shell = SimpleNamespace(kernel=object()) if place == "notebook" else SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: place == "terminal")
    caplog.set_level(logging.INFO, "convnextv2.training")
    log, progress = reporters(None, None)
    log("a line")
    assert list(progress([1, 2], 2, "epoch 1/1")) == [1, 2]
    out, err = capsys.readouterr()
    assert ("epoch 1/1" in err) == (place != "neither")
    assert ("a line" in out, "a line" in err, "a line" in caplog.text) == tuple(
        place == here for here in ("notebook", "terminal", "neither")
    )
    lines: list[str] = []
    log, progress = reporters(lines.append, lambda items, total, text: items)
    log("mine")
    assert lines == ["mine"]

"""Probes of a pre-training: the numbers of evaluate.py, in a share of the time, and a run that is as without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import make_images, pretrain_options, weights

from convnextv2.models.config import EncoderConfig
from convnextv2.models.encoder import Encoder
from convnextv2.training import budget as budgeting
from convnextv2.training import probing
from convnextv2.training.budget import Budget, Kept
from convnextv2.training.options import RunOptions
from convnextv2.training.pretraining import PretrainResult, PretrainTask, pretrain
from convnextv2.training.probing import may_be_labelled, snapshot
from convnextv2.training.run import run_task


def noisy(folder: Path, count: int, seed: int = 0) -> Path:
    """Three kinds of stripes that are told apart now and then."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(("a", "b", "c")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            stripes = 12 * np.sin(np.arange(40) * (1 + number) / 2)[None, :, None]
            pixels = np.clip(rng.normal(120, 40, (36, 40, 3)) + stripes, 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set")


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``parted`` has ``train`` and ``val``, ``split`` has not, ``other`` is another set of the same classes."""
    root = tmp_path_factory.mktemp("hard")
    noisy(root / "parted" / "train", 16)
    noisy(root / "parted" / "val", 8, seed=1)
    noisy(root / "split", 16, seed=2)
    return root


def evaluated(script: Any, what: str, run: Path, data: object, *more: object) -> float:
    output = run.parent / f"{what}.json"
    result = script("evaluate", what, run, data, "--device", "cpu", "--output", output, *more)
    assert result.status == 0, result.err
    return json.loads(output.read_text())["top1"]


@pytest.mark.parametrize("name", ["parted", "split", "digits"])
def test_the_numbers_are_those_of_evaluate(script: Any, hard: Path, tmp_path: Path, name: str) -> None:
    data = name if name == "digits" else hard / name
    small: dict[str, Any] = {"in_chans": 1, "img_size": 16, "batch_size": 256, "epochs": 1}
    changes = small if name == "digits" else {"lr": 3e-2, "epochs": 1 if name == "parted" else 2}
    options = pretrain_options(data, tmp_path / "run", probe="auto", probe_every=1, seed=3, val_fraction=0.3, **changes)
    lines: list[str] = []
    row = pretrain(options, log=lines.append).metrics[-1]
    drawn = "--seed", 3, "--val-fraction", 0.3
    for what in ("knn", "linear"):
        found = evaluated(script, what, tmp_path / "run", data, *drawn)
        assert row[f"{what}_top1"] == found
        assert 0 < found < 100
    assert row["probe_seconds"] > 0
    told = f"kNN {row['knn_top1']:.2f} %, linear {row['linear_top1']:.2f} % (epoch {row['epoch']})"
    assert [told in line for line in lines if line.startswith("epoch ")][-1]
    assert sum(line.startswith("probes: ") for line in lines) == 1


def test_a_probed_run_is_the_same_run(images: Path, tmp_path: Path) -> None:
    losses = {}
    for name, more in (("without", {"probe": "none"}), ("with", {"probe": "auto", "probe_every": 1})):
        options = pretrain_options(images, tmp_path / name, drop_path=0.3, reconstruct_every=1, **more)
        losses[name] = [row["loss"] for row in pretrain(options).metrics]
    assert losses["with"] == losses["without"]
    assert all(
        torch.equal(value, weights(tmp_path / "with")[key]) for key, value in weights(tmp_path / "without").items()
    )
    assert (tmp_path / "with" / "neighbours.png").is_file()
    assert not (tmp_path / "without" / "neighbours.png").exists()


def test_generators_modes_and_precision_are_as_before(images: Path, tmp_path: Path) -> None:
    states: list[Any] = []

    class Watched(PretrainTask):
        def after_epoch(self, accelerator: Any, model: Any, row: dict[str, Any], say: Any) -> dict[str, float]:
            model.encoder.stages[1].eval()
            torch.set_float32_matmul_precision("high")
            states.append(self.state(model))
            numbers = super().after_epoch(accelerator, model, row, say)
            states.append(self.state(model))
            torch.set_float32_matmul_precision("highest")
            return numbers

        def state(self, model: Any) -> Any:
            drawn = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
            modes = [module.training for module in model.modules()]
            settings = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
            return *drawn, modes, settings, [parameter.data_ptr() for parameter in model.parameters()]

    options = pretrain_options(images, tmp_path / "run", epochs=1, probe="auto", probe_every=1)
    result = run_task(Watched(options), PretrainResult)
    assert "linear_top1" in result.metrics[0]
    before, after = states
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert set(before[2]) == {True, False}


def test_a_snapshot_shares_the_weights_alone() -> None:
    encoder = Encoder(EncoderConfig((1, 1, 1, 1), (8, 8, 8, 8), patch_size=8)).train()
    state = torch.get_rng_state()
    copy = snapshot(encoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(copy.parameters(), encoder.parameters(), strict=True))
    assert encoder.training
    assert not copy.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert encoder.stages[0][0].dwconv.weight.is_contiguous()  # type: ignore[index, union-attr, operator]


@pytest.mark.parametrize("cost", [0.2, 1.0, 3.9, 4.9, 5.1])
def test_probes_take_a_twentieth_at_most_and_one_is_left_for_the_end(cost: float) -> None:
    budget, probed, epochs = Budget(), list[int](), 20
    for epoch in range(1, epochs + 1):
        budget.trained += 4.75  # 95 in all: a twentieth of the whole is 5 where it is used up
        if budget.allows(cost, 0 if epoch == epochs else cost, epoch / epochs):
            budget.spent += cost
            probed.append(epoch)
        assert budget.spent <= 0.05 * (budget.trained + budget.spent) + 1e-9
    assert len(probed) == min(epochs, int(5 / cost))
    assert (epochs in probed) == (cost < 5)


def test_what_a_resumed_run_knows_is_read_or_begun_anew() -> None:
    budget = Budget(10.0, 0.5, 0.01, 0.2, 0.1, 0.3)
    assert Budget.read(json.loads(json.dumps(vars(budget)))) == budget
    for damaged in (None, [], "x", {}, {**vars(budget), "more": 1}, {**vars(budget), "spent": -1}, {"trained": 1.0}):
        assert Budget.read(damaged) == Budget()
    for wrong in (float("nan"), float("inf"), "1", None, 10**400):
        assert Budget.read({**vars(budget), "trained": wrong}) == Budget()


def test_the_time_of_all_sessions_counts(images: Path, tmp_path: Path) -> None:
    options = {"probe": "auto", "probe_every": 2}
    pretrain(pretrain_options(images, tmp_path / "run", epochs=1, **options))
    rows = pretrain(pretrain_options(images, tmp_path / "run", epochs=3, resume=True, **options)).metrics
    assert [row["epoch"] for row in rows if "knn_top1" in row] == [1, 2, 3]  # after every second and every last one
    saved = json.loads((tmp_path / "run/checkpoints/state/progress.json").read_text())["probing"]
    assert saved["trained"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert saved["spent"] == pytest.approx(sum(row["probe_seconds"] for row in rows), abs=0.01)
    assert 0 < saved["linear"] < saved["spent"]


def test_what_there_is_time_for(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a moment nothing, which is told once; with a larger share all, or what alone is short enough."""
    lines: list[str] = []
    short = pretrain(pretrain_options(images, tmp_path / "short", probe="auto", epochs=1), log=lines.append)
    assert not any("knn_top1" in row for row in short.metrics)
    (told,) = [line for line in lines if "no probe" in line]
    assert "no probe by kNN after the last epoch" in told
    assert "`probe_every`" in told
    monkeypatch.setattr(budgeting, "SHARE", 1 - 1e-9)
    rich = pretrain(pretrain_options(images, tmp_path / "rich", probe="auto", epochs=1), log=lines.append)
    assert all({"knn_top1", "linear_top1", "probe_seconds"} <= row.keys() for row in rich.metrics)
    monkeypatch.setattr(probing, "LINEAR_SECONDS", 1e9)
    rich = pretrain(pretrain_options(images, tmp_path / "less", probe="auto", epochs=1), log=lines.append)
    assert all("knn_top1" in row and "linear_top1" not in row for row in rich.metrics)
    assert "no probe by a linear classifier after the last epoch" in lines[-2]


def test_a_pass_that_would_take_too_long_is_given_up(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was guessed to be short is not: no number, and a guess that is longer."""
    monkeypatch.setattr(Budget, "allows", lambda self, cost, last, done: cost <= self.left)
    monkeypatch.setattr(Budget, "left", 1e-9)
    monkeypatch.setattr(PretrainTask, "after_epoch", guessing())
    lines: list[str] = []
    rows = pretrain(pretrain_options(images, tmp_path / "run", probe="auto"), log=lines.append).metrics
    assert not any("knn_top1" in row for row in rows)
    assert rows[0]["probe_seconds"] < 2
    assert sum("a probe was given up after" in line for line in lines) == 1
    assert "no probe by kNN after the last epoch" in lines[-2]


def guessing() -> Any:
    """An after_epoch to which training looks endlessly fast in the first epoch."""
    original = PretrainTask.after_epoch

    def after_epoch(self: Any, accelerator: Any, model: Any, row: dict[str, Any], say: Any) -> dict[str, float]:
        endless = {**row, "images_per_s": 1e12} if row["epoch"] == 1 else row
        return original(self, accelerator, model, endless, say)

    return after_epoch


def test_without_labels_neighbours_are_drawn_alone(images: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        shutil.copy(path, tmp_path / "flat" / f"{number}.png")
    lines: list[str] = []
    options = pretrain_options(tmp_path / "flat", tmp_path / "run", epochs=1, probe="auto", reconstruct_every=1)
    (row,) = pretrain(options, log=lines.append).metrics
    assert "knn_top1" not in row
    assert not [line for line in lines if "probe" in line]
    assert Image.open(tmp_path / "run" / "neighbours.png").size[0] > 500
    (tmp_path / "run" / "neighbours.png").write_text("of another run")
    pretrain(pretrain_options(images, tmp_path / "run", epochs=1, overwrite=True))
    assert not (tmp_path / "run" / "neighbours.png").exists()


def test_labels_are_looked_for_where_they_may_be(tmp_path: Path) -> None:
    for name in ("flat/.hidden", "flat/x", "classes/a", "classes/b", "parted/train/a", "parted/val/a"):
        (tmp_path / name).mkdir(parents=True)
    assert [may_be_labelled(str(tmp_path / name)) for name in ("flat", "classes", "parted")] == [False, True, False]
    (tmp_path / "parted" / "train" / "b").mkdir()
    assert may_be_labelled(str(tmp_path / "parted"))
    assert may_be_labelled("digits")


def test_wrong_probes_are_refused_before_a_file_is_written(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "red", tmp_path / "single" / "red")
    (tmp_path / "empty").mkdir()
    for probe, word in (
        ("nowhere", "`probe` nowhere: no such folder"),
        ("", "`probe` is empty"),
        (tmp_path / "single", "at least two classes"),
        (tmp_path / "empty", "found no usable one"),
        (images / "red" / "0.png", "`probe` .*: not a folder"),
    ):
        with pytest.raises(ValueError, match=word):
            pretrain(pretrain_options("digits", tmp_path / "run", probe=probe))
    with pytest.raises(ValueError, match="`probe_every` must be at least 1"):
        pretrain(pretrain_options("digits", tmp_path / "run", probe_every=0))
    with pytest.raises(ValueError, match="lies in the `probe`"):
        pretrain(pretrain_options("digits", images / "red" / "run", probe=images))
    assert not (tmp_path / "run").exists()
    assert issubclass(probing.ProbeOptions, RunOptions)


def test_a_probe_that_fails_ends_the_probes_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of\nmemory")

    monkeypatch.setattr(probing, "knn_predict", full)
    lines: list[str] = []
    rows = pretrain(pretrain_options(images, tmp_path / "run", probe="auto", probe_every=1), log=lines.append).metrics
    assert [line for line in lines if "no more probes" in line] == ["notice: no more probes: out of memory"]
    assert [("probe_seconds" in row, "knn_top1" in row) for row in rows] == [(True, False), (False, False)]


def test_images_that_break_are_left_out_and_told(hard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convnextv2.data.folders.FULL_CHECK_BYTES", 0)
    shutil.copytree(hard / "split", tmp_path / "set")
    (tmp_path / "set" / "a" / "notes.txt").write_text("no image")
    bad = tmp_path / "set" / "b" / "3.png"
    bad.write_bytes(bad.read_bytes()[:300])
    lines: list[str] = []
    options = pretrain_options(hard / "parted", tmp_path / "run", probe=tmp_path / "set", probe_every=1)
    rows = pretrain(options, log=lines.append).metrics
    (told,) = [line for line in lines if "unusable" in line]
    assert "skipped 2 unusable files" in told
    assert "notes.txt" in told
    assert str(bad) in told
    assert all(0 < row["knn_top1"] <= 100 for row in rows)


def test_batches_are_kept_if_they_are_small() -> None:
    passes = 0

    def loader() -> Any:
        nonlocal passes
        passes += 1
        yield from (
            (torch.full((2, 4), number, dtype=torch.uint8), torch.tensor([number]), [""]) for number in range(3)
        )

    for most, times in ((24, 1), (23, 3)):
        kept, passes = Kept(most), 0
        for _ in range(3):
            batches = list(kept(loader()))
            assert [(int(images[0, 0]), int(numbers), reasons) for images, numbers, reasons in batches] == [
                (number, number, [""]) for number in range(3)
            ]
        assert passes == times


def test_other_processes_do_not_wait_for_long(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "LONGEST_WAIT", 0.0)
    monkeypatch.setattr(probing, "in_first_process", lambda work: work())

    class Two(PretrainTask):
        def after_epoch(self, accelerator: Any, model: Any, row: dict[str, Any], say: Any) -> dict[str, float]:
            class Crowd:
                device, num_processes = accelerator.device, 2

            return super().after_epoch(Crowd, model, row, say)  # type: ignore[arg-type]

    lines: list[str] = []
    options = pretrain_options(images, tmp_path / "run", probe="auto", probe_every=1)
    rows = run_task(Two(options), PretrainResult, log=lines.append).metrics
    assert sum("other processes would wait for" in line for line in lines) == 1
    assert not any("knn_top1" in row for row in rows)


def test_options_that_are_no_folders_are_no_data(tmp_path: Path) -> None:
    for probe, data in (("auto", "digits"), ("none", ""), ("digits", "digits"), (tmp_path, str(tmp_path))):
        assert pretrain_options("digits", tmp_path / "run", probe=probe).probe_data == data

import json
import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import compile_without_inductor, finetune_options, make_images, pretrain_options, weights

from convnextv2 import ConvNeXtV2
from convnextv2.data.sources import DataError
from convnextv2.training import FinetuneOptions, RunStoppedError, finetune, pretrain
from convnextv2.training.draws import Draws
from convnextv2.training.finetuning import ClassifierTask, evaluate, resolve
from convnextv2.weights.checkpoint import CheckpointError, load_checkpoint
from convnextv2.weights.loading import load_model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set", count=6)


@pytest.fixture(scope="module")
def pretrained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(pretrain_options(images, output, epochs=1))
    return output


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.pictures
def test_colours_are_learned_and_everything_is_written(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = finetune_options(images, output, epochs=8, lr=1e-2, warmup_epochs=1.0, crop_scale=(0.8, 1.0))
    summary = finetune(replace(options, hflip=0.0, smoothing=0.0))
    assert summary.best_top1 == 100.0
    assert summary.val_images == 3
    assert json.loads((output / "class_indices.json").read_text()) == {"0": "blue", "1": "green", "2": "red"}
    rows = metrics(output)
    assert len(rows) == 8
    assert {"train_loss", "val_loss", "val_top1", "lr", "images_per_s", "feature_diversity"} <= rows[-1].keys()
    assert "val_top5" not in rows[-1]
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    for name in ("confusion_matrix.png", "loss.png"):
        assert (output / name).stat().st_size > 1000
    best = load_checkpoint(output)
    assert best.path.name == "best.safetensors"
    assert best.metadata["epoch"] == summary.best_epoch
    model = load_model(output)
    assert isinstance(model, ConvNeXtV2)
    assert model.config.class_names == ("blue", "green", "red")


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune(finetune_options(images, tmp_path / "eager"))
    modes = compile_without_inductor(monkeypatch)
    finetune(finetune_options(images, tmp_path / "compiled", compile="default"))
    assert modes == ["default"]
    for eager, compiled in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True):
        assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-4)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "eager").keys()


def test_init_fills_open_options_and_starts_the_head_small(images: Path, pretrained: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = FinetuneOptions(
        data=str(images),
        output=str(tmp_path / "run"),
        init=str(pretrained),
        epochs=1,
        workers=0,
        batch_size=4,
        lr=1e-30,
    )
    finetune(options, log=lines.append)
    assert any("dropped: decoder" in line and "freshly initialised: norm, head" in line for line in lines)
    before, after = weights(pretrained), weights(tmp_path / "run")
    stem = "downsample_layers.0.0.weight"
    assert torch.allclose(before[f"encoder.{stem}"], after[stem], atol=1e-12)
    assert after["head.weight"].abs().max() < 0.001
    assert load_checkpoint(tmp_path / "run").metadata["img_size"] == [32, 32]
    recipe = (tmp_path / "run" / "config.yaml").read_text()
    assert "patch_size: 8" in recipe
    finetune(replace(finetune_options(images, tmp_path / "scratch", epochs=1), lr=1e-30))
    assert weights(tmp_path / "scratch")["head.weight"].abs().max() > 0.01


def test_an_option_given_wins_over_the_checkpoint(images: Path, pretrained: Path, tmp_path: Path) -> None:
    options = FinetuneOptions(data=str(images), output=str(tmp_path), init=str(pretrained), img_size=(64, 64))
    found, checkpoint, statistics = resolve(options)
    assert found.img_size == (64, 64)
    assert (found.patch_size, found.depths) == (8, (1, 1, 1, 1))
    assert checkpoint is not None
    assert statistics is not None
    with pytest.raises(CheckpointError, match="the network is convnextv2_femto"):
        finetune(replace(options, model="convnextv2_femto", output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_linear_probe_changes_norm_and_head_alone(images: Path, pretrained: Path, tmp_path: Path) -> None:
    output = tmp_path / "probe"
    finetune(finetune_options(images, output, init=str(pretrained), linear_probe=True, lr=0.1, drop_path=0.5))
    before, after = weights(pretrained), weights(output)
    encoder = [name for name in after if name.split(".")[0] not in ("norm", "head")]
    assert all(torch.equal(before[f"encoder.{name}"], after[name]) for name in encoder)
    assert after["norm.weight"].ne(1).any()
    with pytest.raises(ValueError, match="`linear_probe` needs `init`"):
        finetune(finetune_options(images, tmp_path / "other", linear_probe=True))


def test_a_stopped_and_resumed_run_is_bit_identical(images: Path, tmp_path: Path) -> None:
    extra: dict[str, Any] = {
        "epochs": 4,
        "mixup": 0.8,
        "cutmix": 1.0,
        "ema_decay": 0.9,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.5,
        "drop_path": 0.3,
        "layer_decay": 0.7,
        "layer_decay_type": "group",
        "lr": 1e-3,
    }

    def stop(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
        for index, item in enumerate(items):
            if index == 1 and description.startswith("epoch 3/"):
                signal.raise_signal(signal.SIGINT)
            yield item

    finetune(finetune_options(images, tmp_path / "whole", **extra))
    with pytest.raises(RunStoppedError) as stopped:
        finetune(finetune_options(images, tmp_path / "parts", **extra), progress=stop)
    assert stopped.value.status == 130
    finetune(finetune_options(images, tmp_path / "parts", **extra, resume=True))
    for name in ("best", "last"):
        expected, got = weights(tmp_path / "whole", name), weights(tmp_path / "parts", name)
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert metrics(tmp_path / "whole")[-1]["val_loss"] == metrics(tmp_path / "parts")[-1]["val_loss"]
    raw = torch.load(tmp_path / "parts/checkpoints/state/custom_checkpoint_0.pkl", weights_only=True)
    assert torch.equal(raw["module.head.weight"], weights(tmp_path / "parts")["head.weight"])


def test_the_kernels_of_the_processor_give_the_losses_of_torch(images: Path, tmp_path: Path) -> None:
    """To rounding; the losses of ``torch`` are those of a network without such kernels."""
    losses: dict[str, list[float]] = {}
    for backend in ("torch", "auto"):
        found = losses[backend] = []
        options = finetune_options(images, tmp_path / backend, epochs=3, lr=1e-3, drop_path=0.3, backend=backend)
        finetune(options, on_loss=lambda step, loss, found=found: found.append(loss))
    assert len(losses["auto"]) >= 6
    assert losses["auto"] == pytest.approx(losses["torch"], rel=1e-5)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_mixup_mixes_different_images(images: Path, tmp_path: Path, views: int) -> None:
    """Crops of one image, which stand together in a batch, are of one class."""
    task = ClassifierTask(finetune_options(images, tmp_path, mixup=1.0, views=views, batch_size=4 * views, smoothing=0))
    task.resolve(None)
    task.data()
    task.draws = Draws(0, 4 * views)
    labels = torch.tensor([0, 1, 2, 0]).repeat_interleave(views)
    pictures = labels.float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()
    targets = task.draws.mix(task._mix, pictures, labels, views)
    assert targets.shape == (4 * views, 3)
    for target, picture, label, other in zip(
        targets, pictures, labels, torch.tensor([1, 0, 0, 2]).repeat_interleave(views), strict=True
    ):
        assert set(target.nonzero()[:, 0].tolist()) == {int(label), int(other)}
        assert picture.mean() == pytest.approx(float(target @ torch.arange(3.0)), abs=1e-5)
    assert task.fit_batch(4 * views + 1) == 4 * views


def test_odd_batches_are_made_even_for_mixup(images: Path, tmp_path: Path) -> None:
    finetune(finetune_options(images, tmp_path / "run", batch_size=5, mixup=0.2, epochs=1))
    assert metrics(tmp_path / "run")[0]["step"] == 3  # 15 images in batches of 4


def test_one_class_is_refused_in_a_line(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", classes=("only",))
    with pytest.raises(DataError, match="at least two classes"):
        finetune(finetune_options(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_resume_refuses_other_classes(images: Path, tmp_path: Path) -> None:
    finetune(finetune_options(images, tmp_path / "run", epochs=1))
    other = make_images(tmp_path / "data", classes=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"another network \(class_names"):
        finetune(finetune_options(other, tmp_path / "run", resume=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smoothing": 1.0}, "`smoothing`"),
        ({"ema_decay": 1.0}, "`ema_decay`"),
        ({"val_fraction": 0.0}, "`val_fraction`"),
        ({"layer_decay": 1.5}, "`layer_decay`"),
        ({"img_size": (36, 7)}, "smaller than the patch size 8"),
        ({"crop_scale": (0.5, 0.1)}, "crop_scale"),
    ],
)
def test_bad_options_are_refused_before_a_file_is_written(
    images: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        finetune(finetune_options(images, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_evaluate_counts_top1_top5_loss_and_confusion() -> None:
    from accelerate import Accelerator

    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    logits = torch.zeros(3, 7)
    logits[0, 2] = logits[1, 6] = logits[2, 0] = 50.0
    logits[1, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    labels = torch.tensor([2, 1, 6])
    logits[2, 1:6] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    batches = [(logits[:2].view(2, 7, 1, 1), labels[:2]), (logits[2:].view(1, 7, 1, 1), labels[2:])]
    result = evaluate(Accelerator(cpu=True), Fixed(), batches, 7)
    assert result.numbers["val_top1"] == pytest.approx(100 / 3)
    assert result.numbers["val_top5"] == pytest.approx(200 / 3)
    assert result.numbers["val_loss"] == pytest.approx((0 + 47 + 50) / 3, abs=1e-4)
    expected = torch.zeros(7, 7, dtype=torch.int64)
    expected[2, 2] = expected[1, 6] = expected[6, 0] = 1
    assert torch.equal(result.details, expected)

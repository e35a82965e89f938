"""Fine-tuning: a dense classifier from pre-trained weights or from scratch, or its head alone (a linear probe)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnextv2.data.build import build_finetune_datasets
from convnextv2.data.datasets import ImageDataset
from convnextv2.data.metadata import numbers_of
from convnextv2.data.reading import progress_of
from convnextv2.data.transforms import Augmentation, Statistics
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import ClassifierConfig, EncoderConfig, FCMAEConfig, check_image_size, variant_name
from convnextv2.training.device import Accelerator
from convnextv2.training.head_start import start_head
from convnextv2.training.pictures import save_confusion_matrix
from convnextv2.training.reporting import Log, Progress
from convnextv2.training.result import ValidatedResult
from convnextv2.training.run import run_task
from convnextv2.training.run_folder import RunFolder
from convnextv2.training.starting import check_bands
from convnextv2.training.task import Outcome, Task
from convnextv2.training.task_options import FinetuneOptions
from convnextv2.training.watching import OnLoss
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError, as_checkpoint
from convnextv2.weights.loading import init_classifier
from convnextv2.weights.reading import read_checkpoint, weights_config


@dataclass(frozen=True, eq=False)
class FinetuneResult(ValidatedResult):
    """What a fine-tuning came to; ``model`` is the classifier of the best epoch."""

    model: ConvNeXtV2 = field(repr=False)

    @property
    def best_top1(self) -> float:
        """Per cent of the validation images."""
        return float(self.best["top1"])


def finetune(
    options: FinetuneOptions, *, log: Log | None = None, progress: Progress | None = None, on_loss: OnLoss | None = None
) -> FinetuneResult:
    """Run, or resume, a fine-tuning; arguments and what is raised as :func:`~convnextv2.training.run.run_task`."""
    task = (ProbeTask if options.linear_probe else ClassifierTask)(options)
    return run_task(task, FinetuneResult, log=log, progress=progress, on_loss=on_loss)


def linear_probe(
    options: FinetuneOptions, *, log: Log | None = None, progress: Progress | None = None, on_loss: OnLoss | None = None
) -> FinetuneResult:
    """:func:`finetune` for final norm and head alone, whatever ``options.linear_probe`` says."""
    return finetune(replace(options, linear_probe=True), log=log, progress=progress, on_loss=on_loss)


def resolve(options: FinetuneOptions) -> tuple[FinetuneOptions, Checkpoint | None, Statistics | None]:
    """Fill what was left open from the checkpoint of ``init``, or from the defaults.

    Returns options, the checkpoint, and the mean and standard deviation it was trained with; raises CheckpointError if
    it cannot be read.
    """
    found: dict[str, Any] = {"model": "convnextv2_atto", "patch_size": 32, "in_chans": 3, "img_size": (224, 224)}
    checkpoint, statistics = None, None
    if options.init is not None:
        checkpoint = as_checkpoint(options.init)
        read = weights_config(read_checkpoint(checkpoint))  # first of all: compares what the file says with its weights
        config = checkpoint.config or read
        encoder = config if isinstance(config, EncoderConfig) else config.encoder
        name = variant_name(encoder)
        found |= {"model": name, "patch_size": encoder.patch_size, "in_chans": encoder.in_chans}
        default_size = config.img_size if isinstance(config, FCMAEConfig) else (224, 224)
        size = numbers_of(checkpoint.metadata, "img_size") or default_size
        found["img_size"] = int(size[0]), int(size[-1])
        if options.in_chans in (None, encoder.in_chans) and not options.init_bands:
            own = checkpoint.preprocessing(encoder.in_chans)[:2]
            statistics = own if options.reads_as(checkpoint.metadata, found) else None
        if name is None and options.model is None and options.depths is None:
            found |= {"depths": encoder.depths, "dims": encoder.dims}
    changes = {key: value for key, value in found.items() if getattr(options, key) is None}
    check_bands(filled := replace(options, **changes), None if checkpoint is None else encoder.in_chans)
    return filled, checkpoint, statistics


class ClassifierTask(Task[FinetuneOptions]):
    """A dense classifier, images with labels, and cross entropy, smoothed or of mixed images."""

    name = "finetune"
    loss_name = "train_loss"
    channels_last = True
    measured = frozenset({"top1", "loss", "epoch"})  # after every epoch

    def resolve(self, saved: dict[str, Any] | None) -> None:
        o = self.options
        found, self._checkpoint, statistics = resolve(o if saved is None else replace(o, init=None, init_bands=None))
        self.options = replace(found, init=o.init, init_bands=o.init_bands)
        if saved is not None:
            mean, std = numbers_of(saved, "mean"), numbers_of(saved, "std")
            if mean is None or std is None or (saved["epoch"] and not self.measured <= saved.get("best", {}).keys()):
                raise CheckpointError(f"{o.output}: its state is of no fine-tuning; name another `output`")
            statistics = mean, std
        mean, std = statistics or (None, None)
        self._read: dict[str, Any] = {"mean": mean, "std": std, **self.options.reading(saved)}
        self.ema_decay, self.ema_warmup, self.min_steps = o.ema_decay, o.ema_warmup, o.min_steps
        depths = self.options.encoder().depths
        self.grouping = {"depths": depths, "layer_decay": o.layer_decay, "layer_decay_type": o.layer_decay_type}
        check_image_size(self.options.size, self.options.encoder().patch_size, dense=True)

    def data(self) -> Sequence[ImageDataset]:
        from timm.data.mixup import Mixup
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

        o = self.options
        augmentation = o.augmentation(
            Augmentation(o.crop_scale, o.hflip, o.color_jitter, o.auto_augment or None, o.random_erasing)
        )
        images = o.data, o.size, o.encoder().in_chans
        drawn: dict[str, Any] = {"val_fraction": o.val_fraction, "seed": o.seed, "augmentation": augmentation}
        training, validation = build_finetune_datasets(*images, **(drawn | self._read))
        self._classes = training.classes
        self.files = {"class_indices.json": {str(i): name for i, name in enumerate(self._classes)}}
        self.progress = {"mean": training.mean, "std": training.std, **progress_of(training)}
        self._mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self._loss: nn.Module = LabelSmoothingCrossEntropy(o.smoothing) if o.smoothing else nn.CrossEntropyLoss()
        if o.mixup or o.cutmix:
            self._mix = Mixup(o.mixup, o.cutmix, label_smoothing=o.smoothing, num_classes=len(self._classes))
            self._loss = SoftTargetCrossEntropy()
        return [training, validation]

    def model(self) -> ConvNeXtV2:
        o, scale = self.options, self.options.head_init_scale
        if scale is None:
            scale = 1.0 if o.init is None else 0.001
        names = tuple(self._classes)
        config = ClassifierConfig(o.encoder(), len(names), scale, names, o.pooling)
        return o.recomputing(ConvNeXtV2(config, o.backend))

    def initialise(self, model: ConvNeXtV2, resumed: bool) -> str:
        if self._checkpoint is None:
            return "resuming" if resumed else "from scratch: no `init`"
        return str(init_classifier(model, self._checkpoint, bands=self.options.init_bands))

    def start(self, accelerator: Accelerator, model: ConvNeXtV2, images: ImageDataset) -> str:
        return start_head(model, images, self.options, accelerator.device) if self.options.head_start else ""

    def fit_batch(self, size: int) -> int:
        pair = 1 if self._mix is None else 2 * self.options.views
        if size < pair:
            raise ValueError("`mixup` and `cutmix` need batches of at least two images")
        return size - size % pair

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        images, labels = batch
        size = len(images)
        if self._mix is not None:
            labels = self.draws.mix(self._mix, images, labels, self.options.views)
        return self._loss(model(images).float(), labels), size

    def evaluate(self, accelerator: Accelerator, model: nn.Module, loaders: Sequence[Any]) -> Outcome | None:
        outcome = evaluate(accelerator, model, loaders[0], len(self._classes))
        self.metadata = {"val_top1": outcome.record["top1"], "ema": self.ema_decay > 0}
        return outcome

    def rank(self, record: dict[str, float]) -> tuple[float, float]:
        return record["top1"], -record["loss"]

    def line(self, row: dict[str, Any]) -> str:
        top5 = f", top-5 {row['val_top5']:.2f} %" if "val_top5" in row else ""
        losses = f"train loss {row['train_loss']:.4f}, val loss {row['val_loss']:.4f}"
        return f"{losses}, top-1 {row['val_top1']:.2f} %{top5}"

    def pictures(self, folder: RunFolder, model: Any, examples: Tensor, epoch: int, best: Outcome | None) -> None:
        if best is not None:
            save_confusion_matrix(folder.path / "confusion_matrix.png", best.details, self._classes)


class ProbeTask(ClassifierTask):
    """A classifier of which the encoder is not trained, and stays in evaluation mode."""

    def resolve(self, saved: dict[str, Any] | None) -> None:
        if self.options.init is None:
            raise ValueError("`linear_probe` needs `init`: the head of a frozen random encoder is not worth training")
        super().resolve(saved)

    def initialise(self, model: ConvNeXtV2, resumed: bool) -> str:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.split(".")[0] in ("norm", "head")
        return super().initialise(model, resumed)

    def begin_epoch(self, accelerator: Accelerator, model: nn.Module, epoch: int) -> None:
        model.eval()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: Any, num_classes: int) -> Outcome:
    """Validate on every image of ``loader`` once, over all processes: mean cross entropy, top-1 and, from six classes
    on, top-5 in per cent; confusion matrix ``[K, K]`` (rows: true)."""
    model.eval()
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    loss, in_top5 = 0.0, 0
    for images, labels in loader:
        with accelerator.autocast():
            logits = model(images)
        logits, labels = accelerator.gather_for_metrics((logits.float(), labels))
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        pairs = (labels * num_classes + logits.argmax(1)).cpu()
        confusion += torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
        if num_classes > 5:
            in_top5 += int((logits.topk(5, dim=1).indices == labels[:, None]).sum())
    count = int(confusion.sum())
    numbers = {"val_loss": loss / count, "val_top1": 100 * int(confusion.diagonal().sum()) / count}
    if num_classes > 5:
        numbers["val_top5"] = 100 * in_top5 / count
    return Outcome(numbers, {"top1": numbers["val_top1"], "loss": numbers["val_loss"]}, confusion)

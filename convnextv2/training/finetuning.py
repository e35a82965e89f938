"""Fine-tuning: a dense classifier from pre-trained weights or from scratch, or its head alone (a linear probe)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnextv2.data.build import build_finetune_datasets
from convnextv2.data.datasets import ImageDataset
from convnextv2.data.metadata import numbers_of
from convnextv2.data.transforms import Augmentation, Statistics
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import ClassifierConfig, EncoderConfig, FCMAEConfig, check_image_size, variant_name
from convnextv2.models.pooling import POOLINGS
from convnextv2.training.device import Accelerator
from convnextv2.training.head_start import start_head
from convnextv2.training.loop import OnLoss
from convnextv2.training.optim import LAYER_DECAY_TYPES
from convnextv2.training.options import RunOptions
from convnextv2.training.pictures import save_confusion_matrix
from convnextv2.training.recipe import option
from convnextv2.training.reporting import Log, Progress
from convnextv2.training.result import RunResult
from convnextv2.training.run import run_task
from convnextv2.training.run_folder import RunFolder
from convnextv2.training.task import Outcome, Task
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from convnextv2.weights.loading import init_classifier
from convnextv2.weights.reading import read_checkpoint, weights_config


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunOptions):
    """Options of a fine-tuning run."""

    model: str | None = option(None, "convnextv2_atto … convnextv2_huge; default: the one of --init, else atto")
    img_size: tuple[int, int] | None = option(None, "pixels: 224, or HEIGHTxWIDTH; default: as --init, else 224")
    patch_size: int | None = option(None, "total stride: 32, 16 or 8; default: as --init, else 32")
    in_chans: int | None = option(None, "channels of the images; default: as --init, else 3")
    blr: float = option(
        2e-3,
        "base learning rate: the peak is blr * batch / 256, with accumulation and processes counted in the batch. "
        "2e-3 suits small batches and data; published for a batch of 1024: 2e-4 (atto) to 1.25e-3 (huge)",
    )
    val_fraction: float = option(0.2, "share of every class to validate on, where DATA has no train/ and val/ folders")
    linear_probe: bool = option(False, "train final norm and head alone; the encoder is frozen, in evaluation mode")
    head_init_scale: float | None = option(None, "factor on the head's weights; default: 0.001 with --init, else 1")
    pooling: str = option("mean", "what the head gets of a channel; mean is the published network's", tuple(POOLINGS))
    head_start: bool = option(False, "start from a head fitted to the encoder's features, instead of a random one")
    min_steps: int = option(0, "updates at least: an epoch passes through a small set as often as that takes")
    layer_decay: float = option(1.0, "factor on the learning rate from each layer to the one below; published .6 to .9")
    layer_decay_type: str = option("single", "a layer: a block (single) or three of stage 2 (group)", LAYER_DECAY_TYPES)
    smoothing: float = option(0.1, "label smoothing")
    mixup: float = option(0.0, "mixup's alpha; 0 for none")
    cutmix: float = option(0.0, "CutMix's alpha; 0 for none")
    auto_augment: str | None = option(None, "timm's augmentation policy; published: rand-m9-mstd0.5-inc1")
    color_jitter: float = option(0.0, "strength of the colour jitter; not with --auto-augment")
    random_erasing: float = option(0.0, "probability that a rectangle is replaced by noise; published: 0.25")
    crop_scale: tuple[float, float] | None = option(None, "shares of the area to crop; default: 0.08 1 (digits: 0.5 1)")
    hflip: float | None = option(None, "probability of a horizontal flip; default: 0.5 (digits: 0)")
    backend: str = option("auto", "of the blocks on a processor: auto, torch, or cpu for its compiled kernels")
    ema_decay: float = option(0.0, "average the weights with this decay and validate the average; published: 0.9999")
    ema_warmup: bool = option(True, "let the average's decay rise from 0, so that short runs have a use for it")

    def check(self) -> None:
        super().check()
        self.require("must be at least 0 and below 1.0", lambda value: 0 <= value < 1, "smoothing", "ema_decay")
        not_negative = "mixup", "cutmix", "min_steps"
        self.require("must be at least 0 and below inf", lambda value: 0 <= value < math.inf, *not_negative)
        self.require("must be between 0 and 1", lambda value: 0 < value < 1, "val_fraction")
        self.require("must be in (0, 1]", lambda value: 0 < value <= 1, "layer_decay")


@dataclass(frozen=True, eq=False)
class FinetuneResult(RunResult):
    """What a fine-tuning came to; ``model`` is the classifier of the best epoch."""

    model: ConvNeXtV2 = field(repr=False)
    best: dict[str, float]

    @property
    def best_top1(self) -> float:
        """Per cent of the validation images."""
        return float(self.best["top1"])

    @property
    def best_epoch(self) -> int:
        """Its epoch, from 1."""
        return int(self.best["epoch"])

    @property
    def val_images(self) -> int:
        """Images validated on."""
        return self.images[1]


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
        checkpoint = load_checkpoint(options.init)
        read = weights_config(read_checkpoint(checkpoint))  # first of all: compares what the file says with its weights
        config = checkpoint.config or read
        encoder = config if isinstance(config, EncoderConfig) else config.encoder
        name = variant_name(encoder)
        found |= {"model": name, "patch_size": encoder.patch_size, "in_chans": encoder.in_chans}
        default_size = config.img_size if isinstance(config, FCMAEConfig) else (224, 224)
        in_chans = options.in_chans or encoder.in_chans
        if in_chans == encoder.in_chans:
            mean, std, found["img_size"] = checkpoint.preprocessing(in_chans, default_size)
            statistics = mean, std
        if name is None and options.model is None and options.depths is None:
            found |= {"depths": encoder.depths, "dims": encoder.dims}
    changes = {key: value for key, value in found.items() if getattr(options, key) is None}
    return replace(options, **changes), checkpoint, statistics


class ClassifierTask(Task[FinetuneOptions]):
    """A dense classifier, images with labels, and cross entropy, smoothed or of mixed images."""

    name = "finetune"
    loss_name = "train_loss"
    channels_last = True

    def resolve(self, saved: dict[str, Any] | None) -> None:
        o = self.options
        found, self._checkpoint, statistics = resolve(o if saved is None else replace(o, init=None))
        self.options = replace(found, init=o.init)
        if saved is not None:
            mean, std = numbers_of(saved, "mean"), numbers_of(saved, "std")
            if mean is None or std is None or not {"top1", "loss", "epoch"} <= saved.get("best", {}).keys():
                raise CheckpointError(f"{o.output}: its state is of no fine-tuning; name another `output`")
            statistics = mean, std
        self._statistics = statistics or (None, None)
        self.ema_decay, self.ema_warmup, self.min_steps = o.ema_decay, o.ema_warmup, o.min_steps
        depths = self.options.encoder().depths
        self.grouping = {"depths": depths, "layer_decay": o.layer_decay, "layer_decay_type": o.layer_decay_type}
        check_image_size(self.options.size, self.options.encoder().patch_size, dense=True)

    def data(self) -> Sequence[ImageDataset]:
        from timm.data.mixup import Mixup
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

        o, (mean, std) = self.options, self._statistics
        augmentation = Augmentation(o.crop_scale, o.hflip, o.color_jitter, o.auto_augment or None, o.random_erasing)
        images = o.data, o.size, o.encoder().in_chans
        drawn: dict[str, Any] = {"val_fraction": o.val_fraction, "seed": o.seed, "augmentation": augmentation}
        training, validation = build_finetune_datasets(*images, **drawn, mean=mean, std=std, wanted=o.wanted)
        self._classes = training.classes
        self.files = {"class_indices.json": {str(i): name for i, name in enumerate(self._classes)}}
        self.progress = {"mean": training.mean, "std": training.std}
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
        return ConvNeXtV2(ClassifierConfig(o.encoder(), len(names), scale, names, o.pooling), o.backend)

    def initialise(self, model: ConvNeXtV2, resumed: bool) -> str:
        if self._checkpoint is None:
            return "resuming" if resumed else "from scratch: no `init`"
        return str(init_classifier(model, self._checkpoint))

    def start(self, accelerator: Accelerator, model: ConvNeXtV2, images: ImageDataset) -> str:
        return start_head(model, images, self.options, accelerator.device) if self.options.head_start else ""

    def fit_batch(self, size: int) -> int:
        if self._mix is None:
            return size
        if size < 2:
            raise ValueError("`mixup` and `cutmix` need batches of at least two images")
        return size - size % 2

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        images, labels = batch
        size = len(images)
        if self._mix is not None:
            images, labels = self._mix(images, labels)
        return self._loss(model(images).float(), labels), size

    def evaluate(self, accelerator: Accelerator, model: nn.Module, loaders: Sequence[Any]) -> Outcome:
        outcome = evaluate(accelerator, model, loaders[0], len(self._classes))
        self.metadata = {"val_top1": outcome.record["top1"], "ema": self.ema_decay > 0}
        return outcome

    def rank(self, record: dict[str, float]) -> tuple[float, float]:
        return record["top1"], -record["loss"]

    def line(self, row: dict[str, Any]) -> str:
        top5 = f", top-5 {row['val_top5']:.2f} %" if "val_top5" in row else ""
        losses = f"train loss {row['train_loss']:.4f}, val loss {row['val_loss']:.4f}"
        return f"{losses}, top-1 {row['val_top1']:.2f} %{top5}, {row['images_per_s']} images/s"

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

"""Fine-tuning: a dense classifier from pre-trained weights, from scratch, or a head alone on a frozen encoder."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnextv2.data.build import build_finetune_datasets
from convnextv2.data.loading import EpochSampler, derived_seed, make_loader
from convnextv2.data.transforms import Augmentation, preprocessing_from_metadata
from convnextv2.files import append_jsonl, write_json
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import (
    ClassifierConfig,
    EncoderConfig,
    FCMAEConfig,
    check_image_size,
    config_to_dict,
    variant_name,
)
from convnextv2.models.diversity import feature_diversity
from convnextv2.training.device import fitting_batch_size, make_accelerator
from convnextv2.training.loop import Loop
from convnextv2.training.optim import LAYER_DECAY_TYPES, create_optimizer, create_schedule, parameter_groups, scaled_lr
from convnextv2.training.options import RunOptions, flag
from convnextv2.training.recipe import option, write_recipe
from convnextv2.training.reporting import Log, Occasionally, ProgressBar, say_skipped, silent
from convnextv2.training.run_folder import RunFolder, check_same_model
from convnextv2.training.signals import StopSignals
from convnextv2.weights.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from convnextv2.weights.loading import init_classifier
from convnextv2.weights.reading import read_checkpoint, weights_config

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
MODEL_STREAM = 2
PROBE_IMAGES = 16
PRETRAINED_HEAD_SCALE = 0.001
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


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
    layer_decay: float = option(1.0, "factor on the learning rate from each layer to the one below; published .6 to .9")
    layer_decay_type: str = option(
        "single", "a layer is a block (single), or three of stage 2 (group)", LAYER_DECAY_TYPES
    )
    smoothing: float = option(0.1, "label smoothing")
    mixup: float = option(0.0, "mixup's alpha; 0 for none")
    cutmix: float = option(0.0, "CutMix's alpha; 0 for none")
    auto_augment: str | None = option(None, "timm's augmentation policy; published: rand-m9-mstd0.5-inc1")
    color_jitter: float = option(0.0, "strength of the colour jitter; not with --auto-augment")
    random_erasing: float = option(0.0, "probability that a rectangle is replaced by noise; published: 0.25")
    crop_scale: tuple[float, float] | None = option(
        None, "shares of an image's area that random crops take; default: 0.08 1 (digits: 0.5 1)"
    )
    hflip: float | None = option(None, "probability of a horizontal flip; default: 0.5 (digits: 0)")
    ema_decay: float = option(0.0, "average the weights with this decay and validate the average; published: 0.9999")
    ema_warmup: bool = option(True, "let the average's decay rise from 0, so that short runs have a use for it")

    def check(self) -> None:
        super().check()
        for name, high in (("smoothing", 1.0), ("ema_decay", 1.0), ("mixup", math.inf), ("cutmix", math.inf)):
            if not 0 <= getattr(self, name) < high:
                raise ValueError(f"{flag(name)} must be at least 0 and below {high}, got {getattr(self, name)}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val-fraction must be between 0 and 1, got {self.val_fraction}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer-decay must be in (0, 1], got {self.layer_decay}")

    def augmentation(self) -> Augmentation:
        """The training part's augmentation."""
        return Augmentation(
            self.crop_scale, self.hflip, self.color_jitter, self.auto_augment or None, self.random_erasing
        )


@dataclass(frozen=True)
class FinetuneSummary:
    """What a run came to: epochs done, best top-1 in per cent and its epoch, images validated, folder."""

    epochs: int
    best_top1: float
    best_epoch: int
    val_images: int
    output: Path


@dataclass(frozen=True)
class Evaluation:
    """Validation: mean cross entropy, top-1 and top-5 in per cent, confusion matrix ``[K, K]`` (rows: true)."""

    loss: float
    top1: float
    top5: float | None
    confusion: Tensor


def resolve(options: FinetuneOptions) -> tuple[FinetuneOptions, Checkpoint | None, Statistics | None]:
    """Fill what was left open from the checkpoint of ``init``, or from the defaults.

    Returns:
        Options, the checkpoint, and the mean and standard deviation it was trained with.

    Raises:
        CheckpointError: if the checkpoint cannot be read.
    """
    found: dict[str, Any] = {"model": "convnextv2_atto", "patch_size": 32, "in_chans": 3, "img_size": (224, 224)}
    checkpoint, statistics = None, None
    if options.init is not None:
        checkpoint = load_checkpoint(options.init)
        config = checkpoint.config or weights_config(read_checkpoint(checkpoint))
        encoder = config if isinstance(config, EncoderConfig) else config.encoder
        name = variant_name(encoder)
        found |= {"model": name, "patch_size": encoder.patch_size, "in_chans": encoder.in_chans}
        default_size = config.img_size if isinstance(config, FCMAEConfig) else (224, 224)
        in_chans = options.in_chans or encoder.in_chans
        if in_chans == encoder.in_chans:
            mean, std, found["img_size"] = preprocessing_from_metadata(checkpoint.metadata, in_chans, default_size)
            statistics = mean, std
        if name is None and options.model is None and options.depths is None:
            found |= {"depths": encoder.depths, "dims": encoder.dims}
    changes = {key: value for key, value in found.items() if getattr(options, key) is None}
    return replace(options, **changes), checkpoint, statistics


def finetune(options: FinetuneOptions, *, log: Log = logger.info, progress: ProgressBar = silent) -> FinetuneSummary:
    """Run, or resume, a fine-tuning.

    Args:
        options: everything about it.
        log: takes lines for the user.
        progress: wraps the batches of an epoch.

    Raises:
        ValueError: on options that do not fit each other or the data, before any file is written.
        DataError: if there is no usable image, or a single class.
        CheckpointError: if ``init`` or the state to resume from cannot be used.
        DivergedError: if the loss is not finite.
        RunStoppedError: after SIGINT or SIGTERM.
        OSError: if the output cannot be written.
    """
    from accelerate.utils import set_seed
    from timm.utils import ModelEmaV3

    options.check()
    folder = RunFolder(options.output)
    saved = folder.check(options.resume, options.overwrite)
    checkpoint = None
    if saved is None:
        options, checkpoint, statistics = resolve(options)
    else:
        options = replace(resolve(replace(options, init=None))[0], init=options.init)
        statistics = tuple(saved["mean"]), tuple(saved["std"])
    encoder = options.encoder()
    assert options.img_size is not None
    check_image_size(options.img_size, encoder.patch_size)
    mean, std = statistics or (None, None)
    train_set, val_set = build_finetune_datasets(
        options.data,
        options.img_size,
        encoder.in_chans,
        val_fraction=options.val_fraction,
        seed=options.seed,
        augmentation=options.augmentation(),
        mean=mean,
        std=std,
    )
    classes = train_set.classes
    set_seed(derived_seed(options.seed, 0, 0, MODEL_STREAM))
    scale = options.head_init_scale
    if scale is None:
        scale = 1.0 if options.init is None else PRETRAINED_HEAD_SCALE
    model = ConvNeXtV2(ClassifierConfig(encoder, len(classes), scale, tuple(classes)))
    if saved is not None:
        check_same_model(saved, model.config, folder.path)
    report = None if checkpoint is None else init_classifier(model, checkpoint)
    if options.linear_probe:
        if options.init is None:
            raise ValueError("--linear-probe needs --init: the head of a frozen random encoder is not worth training")
        freeze(model)

    accelerator = make_accelerator(options)
    main = accelerator.is_main_process
    say = log if main else logger.debug
    for dataset in (train_set, val_set):
        say(f"data: {dataset.description}")
        say_skipped(dataset.skipped, say)
    say(str(report) if report else "resuming" if saved else "from scratch: no --init")
    batch_size = fitting_batch_size(options, len(train_set), accelerator.num_processes, say)
    mix = _mixup(options, len(classes))
    if mix is not None and batch_size % 2:
        batch_size -= 1
        if not batch_size:
            raise ValueError("--mixup and --cutmix need batches of at least two images")
    options = replace(options, batch_size=batch_size)

    effective_batch = batch_size * options.accum * accelerator.num_processes
    lr = scaled_lr(options.blr, effective_batch, options.lr)
    groups = parameter_groups(
        model,
        options.weight_decay,
        depths=encoder.depths,
        layer_decay=options.layer_decay,
        layer_decay_type=options.layer_decay_type,  # type: ignore[arg-type]  # one of the choices, and checked again
    )
    raw_optimizer = create_optimizer(groups, lr, options.betas, options.optimizer)
    sampler = EpochSampler(len(train_set), options.seed)
    wrapped, optimizer, loader, val_loader = accelerator.prepare(
        model,
        raw_optimizer,
        make_loader(train_set, batch_size, options.workers, sampler),
        make_loader(val_set, batch_size, options.workers),
    )
    schedule = create_schedule(
        raw_optimizer, math.ceil(len(loader) / options.accum), options.epochs, options.warmup_epochs, options.min_lr
    )
    if options.compile is not None:
        wrapped.compile(mode=options.compile)
    ema = ModelEmaV3(model, options.ema_decay, use_warmup=options.ema_warmup) if options.ema_decay else None
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    examples = train_set.examples(PROBE_IMAGES).to(accelerator.device)

    accelerator.wait_for_everyone()
    if main:
        folder.prepare(saved)
        write_recipe(folder.path / "config.yaml", options)
        write_json(folder.path / "class_indices.json", {str(i): name for i, name in enumerate(classes)})
    accelerator.wait_for_everyone()
    if options.tracker is not None:
        accelerator.init_trackers("finetune")
    start, best = 0, {"top1": -1.0, "loss": math.inf, "epoch": 0}
    loss_function = _loss(options, mix is not None)
    with StopSignals() as stop:
        update_ema: Callable[[int], None] | None = (
            (lambda step: ema.update(model, step=step)) if ema is not None else None
        )
        loop = Loop(accelerator, wrapped, optimizer, schedule, folder, stop, options.clip_grad, update_ema)
        if saved is not None:
            folder.load_state(accelerator)
            start, loop.step, best = saved["epoch"], saved["step"], saved["best"]
            say(
                f"resuming after epoch {start}" if start < options.epochs else f"nothing to do: {start} epochs are done"
            )
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        say(
            f"training {trained:,} of {total:,} parameters on {accelerator.device}: "
            f"{len(loader)} steps an epoch of batch {effective_batch}, peak learning rate {lr:.2e}, "
            f"mixed precision: {accelerator.mixed_precision}"
        )

        def loss_of(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
            images, labels = batch
            size = len(images)
            if mix is not None:
                images, labels = mix(images, labels)
            return loss_function(wrapped(images).float(), labels), size

        draw = Occasionally()
        confusion: Tensor | None = None
        for epoch in range(start, options.epochs):
            set_seed(derived_seed(options.seed, epoch, accelerator.process_index))
            sampler.epoch = epoch
            train_set.set_epoch(epoch)
            loader.set_epoch(epoch)  # accelerate's own count, which it hands to the data set, starts anew on resuming
            wrapped.train(not options.linear_probe)
            title = f"epoch {epoch + 1}/{options.epochs}"
            result = loop.epoch(epoch, progress(loader, len(loader), title) if main else loader, loss_of)
            validated = model if ema is None else ema.module
            evaluation = evaluate(accelerator, wrapped if ema is None else ema.module, val_loader, len(classes))
            row: dict[str, Any] = {
                "epoch": epoch + 1,
                "step": loop.step,
                "train_loss": result.loss,
                "val_loss": evaluation.loss,
                "val_top1": evaluation.top1,
                **({} if evaluation.top5 is None else {"val_top5": evaluation.top5}),
                "lr": result.lr,
                "seconds": round(result.seconds, 3),
                "images_per_s": round(result.images / result.seconds, 1),
                "feature_diversity": feature_diversity(validated, examples),
            }
            better = (evaluation.top1, -evaluation.loss) > (best["top1"], -best["loss"])
            if better:
                best = {"top1": evaluation.top1, "loss": evaluation.loss, "epoch": epoch + 1}
            if main:
                append_jsonl(folder.metrics_path, row)
                metadata = {
                    "mean": list(train_set.mean),
                    "std": list(train_set.std),
                    "img_size": list(options.img_size or ()),
                    "epoch": epoch + 1,
                    "val_top1": evaluation.top1,
                    "ema": ema is not None,
                }
                save_checkpoint(folder.checkpoint("last"), validated, model.config, metadata)
                if better:
                    save_checkpoint(folder.checkpoint("best"), validated, model.config, metadata)
                confusion = evaluation.confusion if better else confusion
                if draw(epoch + 1 == options.epochs):
                    _pictures(folder, confusion, classes)
            if options.tracker is not None:
                accelerator.log(row, step=epoch + 1)
            state = {"epoch": epoch + 1, "step": loop.step, "best": best, "config": config_to_dict(model.config)}
            folder.save_state(accelerator, {**state, "mean": train_set.mean, "std": train_set.std})
            top5 = "" if evaluation.top5 is None else f", top-5 {evaluation.top5:.2f} %"
            say(
                f"{title}: train loss {result.loss:.4f}, val loss {evaluation.loss:.4f}, "
                f"top-1 {evaluation.top1:.2f} %{top5}, {row['images_per_s']} images/s"
            )
    if options.tracker is not None:
        accelerator.end_training()
    return FinetuneSummary(
        max(start, options.epochs), float(best["top1"]), int(best["epoch"]), len(val_set), folder.path
    )


def freeze(model: ConvNeXtV2) -> None:
    """Leave only the final norm and the head trainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.split(".")[0] in ("norm", "head")


def _mixup(options: FinetuneOptions, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    if not (options.mixup or options.cutmix):
        return None
    from timm.data.mixup import Mixup

    return Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        label_smoothing=options.smoothing,
        num_classes=num_classes,
    )


def _loss(options: FinetuneOptions, soft_targets: bool) -> nn.Module:
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if soft_targets:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(options.smoothing) if options.smoothing else nn.CrossEntropyLoss()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: Any, num_classes: int) -> Evaluation:
    """Validate on every image of ``loader`` once, over all processes; top-5 from six classes on."""
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
    top1 = 100 * int(confusion.diagonal().sum()) / count
    return Evaluation(loss / count, top1, 100 * in_top5 / count if num_classes > 5 else None, confusion)


def _pictures(folder: RunFolder, confusion: Tensor | None, classes: list[str]) -> None:
    """The loss curve, and the confusion matrix of the best epoch unless an earlier session drew it."""
    from convnextv2.training.pictures import save_confusion_matrix, save_loss_curve

    save_loss_curve(folder.path / "loss.png", folder.metrics())
    if confusion is not None:
        save_confusion_matrix(folder.path / "confusion_matrix.png", confusion, classes)

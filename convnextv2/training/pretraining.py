"""Pre-training: masked images in, an encoder that can be fine-tuned out (ConvNeXt V2, section 3.1)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnextv2.data.build import build_pretrain_dataset
from convnextv2.data.datasets import ImageDataset
from convnextv2.data.loading import EpochSampler, derived_seed, make_loader
from convnextv2.files import append_jsonl
from convnextv2.models.config import config_to_dict
from convnextv2.models.diversity import feature_diversity
from convnextv2.models.fcmae import FCMAE, create_fcmae
from convnextv2.training.device import fitting_batch_size, make_accelerator
from convnextv2.training.loop import Loop
from convnextv2.training.optim import create_optimizer, create_schedule, parameter_groups, scaled_lr
from convnextv2.training.options import RunOptions
from convnextv2.training.recipe import option, write_recipe
from convnextv2.training.reporting import Log, Occasionally, ProgressBar, every, say_skipped, silent
from convnextv2.training.run_folder import RunFolder, check_same_model
from convnextv2.training.signals import StopSignals
from convnextv2.weights.checkpoint import save_checkpoint
from convnextv2.weights.loading import init_fcmae
from sparse_ops.grid import GRN_SCOPES

logger = logging.getLogger(__name__)
STEEP_LR = 1e-2
MASK_STREAM, MODEL_STREAM, PICTURE_SEED = 1, 2, 0
PROBE_IMAGES = 16


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(RunOptions):
    """Options of a pre-training run."""

    blr: float = option(
        1.5e-3,
        "base learning rate: the peak is blr * batch / 256, with accumulation and processes counted in the batch. "
        "1.5e-3 suits batches of up to some hundreds on small data; published for a batch of 4096: 1.5e-4",
    )
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW's two betas")
    mask_ratio: float = option(0.6, "share of the patches that is removed")
    backend: str = option("auto", "of the sparse convolution; python -m sparse_ops lists them")
    grn_scope: str = option(
        "image", "GRN norms over each image, as fine-tuning will, or over the batch as officially", GRN_SCOPES
    )
    decoder_depth: int = option(1, "blocks of the decoder")
    decoder_dim: int = option(512, "channels of the decoder")
    norm_pix_loss: bool = option(True, "normalise target patches by their own mean and variance")
    official_weight_decay: bool = option(False, "decay GRN's parameters and the mask token too, as officially")
    val_fraction: float = option(0.2, "of the digits: the part kept out, which fine-tuning with this seed validates on")
    reconstruct_every: int | None = option(None, "epochs between pictures; about five in a run by default, 0 for none")

    def check(self) -> None:
        super().check()
        if self.reconstruct_every is not None and self.reconstruct_every < 0:
            raise ValueError(f"--reconstruct-every must not be negative, got {self.reconstruct_every}")
        if self.compile is not None and self.backend == "minkowski":
            raise ValueError(
                "--compile: MinkowskiEngine cannot be traced; use another --backend, or leave --compile out"
            )


@dataclass(frozen=True)
class PretrainSummary:
    """What a run came to: epochs done, loss of its first and last epoch, folder."""

    epochs: int
    first_loss: float
    last_loss: float
    output: Path


def pretrain(options: PretrainOptions, *, log: Log = logger.info, progress: ProgressBar = silent) -> PretrainSummary:
    """Run, or resume, a pre-training.

    Args:
        options: everything about it.
        log: takes lines for the user.
        progress: wraps the batches of an epoch.

    Raises:
        ValueError: on options that do not fit each other or the data, before any file is written.
        DataError: if there is no usable image.
        CheckpointError: if ``init`` or the state to resume from cannot be used.
        BackendUnavailableError: if the backend named cannot run here.
        DivergedError: if the loss is not finite.
        RunStoppedError: after SIGINT or SIGTERM.
        OSError: if the output cannot be written.
    """
    from accelerate.utils import set_seed

    options.check()
    folder = RunFolder(options.output)
    saved = folder.check(options.resume, options.overwrite)
    encoder = options.encoder()
    assert options.img_size is not None
    set_seed(derived_seed(options.seed, 0, 0, MODEL_STREAM))
    model = create_fcmae(
        encoder,
        img_size=options.img_size,
        backend=options.backend,
        grn_scope=options.grn_scope,  # type: ignore[arg-type]  # one of the choices, and checked again
        mask_ratio=options.mask_ratio,
        decoder_depth=options.decoder_depth,
        decoder_dim=options.decoder_dim,
        norm_pix_loss=options.norm_pix_loss,
    )
    if saved is not None:
        check_same_model(saved, model.config, folder.path)
    elif options.init is not None:
        log(init_fcmae(model, options.init))
    dataset = build_pretrain_dataset(
        options.data, options.img_size, encoder.in_chans, seed=options.seed, val_fraction=options.val_fraction
    )
    accelerator = make_accelerator(options)
    main = accelerator.is_main_process
    say = log if main else logger.debug
    say(f"data: {dataset.description}")
    say_skipped(dataset.skipped, say)
    batch_size = fitting_batch_size(options, len(dataset), accelerator.num_processes, say)
    options = replace(options, batch_size=batch_size)

    effective_batch = batch_size * options.accum * accelerator.num_processes
    lr = scaled_lr(options.blr, effective_batch, options.lr)
    if lr > STEEP_LR:
        say(f"notice: the learning rate {lr:.2e} is steep; published for large batches: --blr 1.5e-4")
    groups = parameter_groups(model, options.weight_decay, official_weight_decay=options.official_weight_decay)
    raw_optimizer = create_optimizer(groups, lr, options.betas, options.optimizer)
    sampler = EpochSampler(len(dataset), options.seed)
    wrapped, optimizer, loader = accelerator.prepare(
        model, raw_optimizer, make_loader(dataset, batch_size, options.workers, sampler)
    )
    schedule = create_schedule(
        raw_optimizer, math.ceil(len(loader) / options.accum), options.epochs, options.warmup_epochs, options.min_lr
    )
    if options.compile is not None:
        model.compile(mode=options.compile)
    examples = dataset.examples(PROBE_IMAGES).to(accelerator.device)
    masks = torch.Generator(accelerator.device)

    accelerator.wait_for_everyone()
    if main:
        folder.prepare(saved)
        write_recipe(folder.path / "config.yaml", options)
    accelerator.wait_for_everyone()
    if options.tracker is not None:
        accelerator.init_trackers("pretrain")
    start = 0
    with StopSignals() as stop:
        loop = Loop(accelerator, wrapped, optimizer, schedule, folder, stop, options.clip_grad)
        if saved is not None:
            folder.load_state(accelerator)
            start, loop.step = saved["epoch"], saved["step"]
            say(
                f"resuming after epoch {start}" if start < options.epochs else f"nothing to do: {start} epochs are done"
            )
        say(
            f"pre-training {sum(p.numel() for p in model.parameters()):,} parameters on {accelerator.device}: "
            f"{len(loader)} steps an epoch of batch {effective_batch}, peak learning rate {lr:.2e}, "
            f"mixed precision: {accelerator.mixed_precision}"
        )
        draw = Occasionally()
        pictures = every(options.reconstruct_every, options.epochs)

        def loss_of(images: Tensor) -> tuple[Tensor, int]:
            return wrapped(images, generator=masks, return_pred=False).loss, len(images)

        for epoch in range(start, options.epochs):
            set_seed(derived_seed(options.seed, epoch, accelerator.process_index))
            masks.manual_seed(derived_seed(options.seed, epoch, accelerator.process_index, MASK_STREAM))
            sampler.epoch = epoch
            dataset.set_epoch(epoch)
            loader.set_epoch(epoch)  # accelerate's own count, which it hands to the data set, starts anew on resuming
            wrapped.train()
            title = f"epoch {epoch + 1}/{options.epochs}"
            result = loop.epoch(epoch, progress(loader, len(loader), title) if main else loader, loss_of)
            diversity = feature_diversity(model.encoder, examples)
            row: dict[str, Any] = {
                "epoch": epoch + 1,
                "step": loop.step,
                "loss": result.loss,
                "lr": result.lr,
                "seconds": round(result.seconds, 3),
                "images_per_s": round(result.images / result.seconds, 1),
                "feature_diversity": diversity,
            }
            if main:
                append_jsonl(folder.metrics_path, row)
                save_checkpoint(folder.checkpoint("last"), model, model.config, _metadata(options, dataset, epoch + 1))
            if options.tracker is not None:
                accelerator.log(row, step=epoch + 1)
            folder.save_state(
                accelerator, {"epoch": epoch + 1, "step": loop.step, "config": config_to_dict(model.config)}
            )
            if main and draw(epoch + 1 in {*pictures, options.epochs}):
                _pictures(folder, model, dataset, examples, epoch + 1 if epoch + 1 in pictures else None)
            say(f"{title}: loss {result.loss:.4f}, {row['images_per_s']} images/s, feature diversity {diversity:.3f}")
    if options.tracker is not None:
        accelerator.end_training()
    rows = folder.metrics()
    return PretrainSummary(len(rows), rows[0]["loss"], rows[-1]["loss"], folder.path)


def _metadata(options: PretrainOptions, dataset: ImageDataset, epoch: int) -> dict[str, Any]:
    return {
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "img_size": list(options.img_size or ()),
        "epoch": epoch,
        "epochs": options.epochs,
        "seed": options.seed,
    }


def _pictures(folder: RunFolder, model: FCMAE, dataset: ImageDataset, examples: Tensor, epoch: int | None) -> None:
    """The loss curve, and reconstructions after ``epoch`` if that is not None."""
    from convnextv2.training.pictures import save_loss_curve, save_reconstructions

    save_loss_curve(folder.path / "loss.png", folder.metrics())
    if epoch is None:
        return
    model.eval()
    save_reconstructions(
        folder.path / "reconstructions" / f"epoch_{epoch:04d}.png",
        model,
        examples,
        generator=torch.Generator(examples.device).manual_seed(PICTURE_SEED),
        mean=dataset.mean,
        std=dataset.std,
    )

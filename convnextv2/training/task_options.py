"""Options of pre-training and fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from convnextv2.models.config import GRN_SCOPES, POOLINGS
from convnextv2.training.components import LAYER_DECAY_TYPES
from convnextv2.training.hardware import COMPILE_MODES
from convnextv2.training.pixel_options import CropOptions
from convnextv2.training.probe_options import ProbeOptions
from convnextv2.training.recipe import option
from convnextv2.training.starting import StartOptions


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(ProbeOptions, CropOptions):
    """Options of a pre-training run."""

    task: ClassVar[str] = "pretrain"
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
    val_fraction: float = option(0.2, "of digits and class folders to probe on: the part kept out, as in fine-tuning")
    reconstruct_every: int | None = option(None, "epochs between pictures; about five in a run by default, 0 for none")

    def check(self) -> None:
        from sparse_ops.registry import registry  # with torch: not for --help

        super().check()
        self.require("must not be negative", lambda value: value >= 0, "reconstruct_every")
        backend = registry().get(self.backend)
        if self.compile in COMPILE_MODES and backend is not None and not backend.traceable:
            raise ValueError(
                f"`compile`: the backend {backend.name} cannot be traced; use another `backend`, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class TuningOptions(StartOptions):
    """Options of a run that learns from labels, perhaps from a checkpoint on."""

    model: str | None = option(None, "convnextv2_atto … convnextv2_huge; default: the one of --init, else atto")
    img_size: tuple[int, int] | None = option(None, "pixels: 224, or HEIGHTxWIDTH; default: as --init, else 224")
    val_fraction: float = option(0.2, "share of every class to validate on, where DATA has no train/ and val/ folders")
    min_steps: int = option(0, "updates at least: an epoch passes through a small set as often as that takes")
    layer_decay: float = option(
        1.0, "factor on the encoder's learning rate from each layer to the one below; published .6 to .9"
    )
    layer_decay_type: str = option("single", "a layer: a block (single) or three of stage 2 (group)", LAYER_DECAY_TYPES)
    smoothing: float = option(0.0, "label smoothing")
    color_jitter: float = option(0.0, "strength of the colour jitter, of images of 1 or 3 channels")
    backend: str = option("auto", "of the blocks on a processor: auto, torch, or cpu for its compiled kernels")
    ema_decay: float = option(0.0, "average the weights with this decay and validate the average; published: 0.9999")
    ema_warmup: bool = option(True, "let the average's decay rise from 0, so that short runs have a use for it")

    def check(self) -> None:
        super().check()
        self.require("must be at least 0 and below 1.0", lambda value: 0 <= value < 1, "smoothing", "ema_decay")
        self.require("must be at least 0 and below inf", lambda n: 0 <= n < math.inf, "min_steps", "color_jitter")
        self.require("must be between 0 and 1", lambda value: 0 < value < 1, "val_fraction")
        self.require("must be in (0, 1]", lambda value: 0 < value <= 1, "layer_decay")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TuningOptions, CropOptions):
    """Options of a fine-tuning run."""

    task: ClassVar[str] = "finetune"
    blr: float = option(
        2e-3,
        "base learning rate: the peak is blr * batch / 256, with accumulation and processes counted in the batch. "
        "2e-3 suits small batches and data; published for a batch of 1024: 2e-4 (atto) to 1.25e-3 (huge)",
    )
    linear_probe: bool = option(False, "train final norm and head alone; the encoder is frozen, in evaluation mode")
    head_init_scale: float | None = option(None, "factor on the head's weights; default: 0.001 with --init, else 1")
    pooling: str = option("mean", "what the head gets of the channels; mean is the published network's", POOLINGS)
    head_start: bool = option(False, "start from a head fitted to the encoder's features, instead of a random one")
    smoothing: float = option(0.1, "label smoothing")
    mixup: float = option(0.0, "mixup's alpha; 0 for none")
    cutmix: float = option(0.0, "CutMix's alpha; 0 for none")
    auto_augment: str | None = option(
        None, "timm's augmentation policy, not with --color-jitter; published: rand-m9-mstd0.5-inc1"
    )
    random_erasing: float = option(0.0, "probability that a rectangle is replaced by noise; published: 0.25")

    def check(self) -> None:
        super().check()
        self.require("must be at least 0 and below inf", lambda value: 0 <= value < math.inf, "mixup", "cutmix")

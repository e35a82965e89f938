"""Options of every run."""

# ruff: noqa: RUF009  # option() makes a field

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from convnextv2.data.decoding import MAX_PIXELS, RESIZERS, Wanted
from convnextv2.evaluation.choices import PRECISIONS
from convnextv2.models.config import EncoderConfig, encoder_config
from convnextv2.training.cooldown import SCHEDULES, check_schedule
from convnextv2.training.feeding_options import PLACES, check_feeding, least_side
from convnextv2.training.hardware import COMPILE_CHOICES, SHARDINGS, check_hardware
from convnextv2.training.option_types import check_types, plain_value
from convnextv2.training.pixel_options import PixelOptions
from convnextv2.training.recipe import option

TRACKERS = ("auto", "none", "tensorboard", "wandb", "mlflow", "trackio")  # named as their packages


@dataclass(frozen=True, kw_only=True)
class RunOptions(PixelOptions):
    """Options of every run; paths may be given as such, and a size in pixels as one number for a square."""

    data: str | Path = option("", "folder of images, or 'digits' for the embedded handwritten digits")
    output: str | Path = option("", "folder of the run; must be new or empty, but with --resume or --overwrite")
    model: str | None = option("convnextv2_atto", "convnextv2_atto, femto, pico, nano, tiny, base, large or huge")
    epochs: int = option(20, "passes over the data")
    batch_size: int = option(64, "images a step and process; no more than there are images is taken")
    img_size: tuple[int, int] | int | None = option((224, 224), "pixels: 224, or HEIGHTxWIDTH as in 192x256")
    patch_size: int | None = option(32, "pixels a patch side: 32, 16 or 8 (the total stride; smaller for small images)")
    in_chans: int | None = option(3, "channels of the images")
    seed: int = option(0, "of initial weights, order, augmentation and masks")
    workers: int = option(2, "processes that load images; 0 loads in the main process")
    max_bad: float = option(0.1, "stop when more than this share of the images has become unreadable; 1 for never")
    max_pixels: int = option(MAX_PIXELS, "largest width × height of an image; larger JPEG are reduced, others skipped")
    reduce_jpeg: bool = option(False, "decode large JPEG at a reduced size that no crop is enlarged from; pixels vary")
    cache: str | Path | None = option(None, "folder to keep decoded images in, built by the first run that needs it")
    cache_side: int | None = option(None, "pixels of the shorter side in --cache at most; default: no crop is enlarged")
    resize: str = option("pillow", "what resizes crops; torchvision is faster, some pixels differ by 1 or 2", RESIZERS)
    augment_on: str = option("loader", "where crops are resized and flipped: loader, or device (for GPUs)", PLACES)
    views: int = option(1, "crops of each decoded image, each with its own mask; --batch-size counts crops")
    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda or cuda:N")
    precision: str = option(
        "auto",
        "mixed precision: auto (bf16 on a GPU that has it, else no), no, bf16 or fp16 (fp16 needs a GPU); quote 'no' "
        "in a recipe",
        PRECISIONS,
    )
    tf32: bool = option(False, "float32 matrix products and convolutions in TensorFloat-32, on GPUs that have it")
    compile: str | None = option(
        "auto",
        "torch.compile with a mode, or none; reduce-overhead uses CUDA graphs; auto: those in pre-training on a GPU "
        "with the backend triton, without accumulation, nothing elsewhere",
        COMPILE_CHOICES,
    )
    sharding: str = option("none", "full: each process keeps a part of weights, gradients and moments", SHARDINGS)
    accum: int = option(1, "batches whose gradients are added up before an update")
    lr: float | None = option(None, "peak learning rate; overrides --blr")
    min_lr: float = option(0.0, "learning rate at the end of the schedule")
    schedule: str = option("cosine", "after the warm-up: cosine, or constant up to --cooldown-epochs", SCHEDULES)
    cooldown_epochs: float = option(0.0, "last epochs of a constant --schedule, that end it at --min-lr")
    warmup_epochs: float = option(2.0, "epochs over which the learning rate rises; at most half of the run")
    weight_decay: float = option(0.05, "AdamW's; never on biases and norms")
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW's two betas")
    optimizer: str = option("adamw", "any optimizer of timm's that takes betas")
    clip_grad: float | None = option(None, "largest norm of the gradient; try 1 where a run diverges")
    drop_path: float = option(0.0, "stochastic depth of the last block")
    depths: tuple[int, int, int, int] | None = option(None, "blocks of the four stages, for a custom size; with --dims")
    dims: tuple[int, int, int, int] | None = option(None, "channels of the four stages, for a custom size")
    init: str | Path | None = option(
        None, "first weights: file, run folder, published name, address or hf-hub:org/name; see also --resume"
    )
    resume: bool | Literal["auto"] = option(
        False,
        "continue the run in --output, with its own recipe but for what is given; auto: or start one if there is none",
        ("auto",),
    )
    save_minutes: float = option(10.0, "minutes between two states to resume from, beside those after every epoch")
    save_steps: int | None = option(None, "also save one whenever so many updates have been made")
    keep_states: int = option(2, "last states to keep: where the newest is damaged, --resume takes the one before")
    skip_steps: int = option(0, "updates that may be left out because the gradient is not finite; then the run ends")
    timeout_minutes: float = option(30.0, "end the run when one of its processes has not answered for so long")
    overwrite: bool = option(False, "delete the run in --output and start anew")
    patience: int | None = option(None, "end after this many epochs without a better evaluation")
    tracker: str | None = option("auto", "log to tensorboard, wandb, mlflow, trackio, none; auto: tensorboard if there")

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, plain_value(item.name, getattr(self, item.name)))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, once that is known."""
        if not isinstance(self.img_size, tuple):
            raise ValueError("`img_size` is missing: pixels, one number for a square or (height, width)")
        return self.img_size

    @property
    def wanted(self) -> Wanted:
        """What is wanted of image files."""
        return self.wanted_pixels(self.max_pixels, least_side(self))

    def check(self) -> None:
        """Raise ValueError on options out of range, TypeError on those of a wrong type."""
        from convnextv2.data.opening import why_unknown  # with torch: not for --help

        check_types(self)
        if not self.data:
            raise ValueError("`data` is missing: a folder of images, or 'digits'")
        if not self.output:
            raise ValueError("`output` is missing: the folder to write the run to")
        if problem := why_unknown(self.data):
            raise ValueError(f"`data` {problem}")
        counts = "epochs", "batch_size", "accum", "max_pixels", "save_steps", "keep_states", "patience"
        self.require("must be at least 1", lambda value: value >= 1, *counts)
        not_negative = "workers", "seed", "warmup_epochs", "cooldown_epochs", "weight_decay", "min_lr", "skip_steps"
        self.require("must be a finite number, not negative", lambda value: 0 <= value < math.inf, *not_negative)
        positive = "lr", "blr", "clip_grad", "save_minutes", "timeout_minutes"
        self.require("must be positive", lambda value: 0 < value < math.inf, *positive)
        self.require("must be in [0, 1]", lambda value: 0 <= value <= 1, "max_bad")
        self.require("must be in [0, 1)", lambda value: all(0 <= beta < 1 for beta in value), "betas")
        check_feeding(self)
        self.check_pixels()
        check_schedule(self)
        if self.resume and self.overwrite:
            raise ValueError("`resume` and `overwrite` exclude each other")
        check_hardware(self)
        self.require(f"must be one of {', '.join(TRACKERS)}", TRACKERS.__contains__, "tracker")
        if self.tracker in TRACKERS[2:] and importlib.util.find_spec(self.tracker) is None:
            raise ValueError(f"`tracker` {self.tracker} is not installed: pip install {self.tracker}")

    def require(self, rule: str, holds: Callable[[Any], bool], *names: str) -> None:
        """Raise ValueError, in the words of the rule, unless it holds for each of these options that is given."""
        for name in names:
            value = getattr(self, name, None)
            if value is not None and not holds(value):
                raise ValueError(f"`{name}` {rule}, got {value!r}")

    def encoder(self) -> EncoderConfig:
        """The encoder of these options; ValueError if the name is unknown or a value is out of range."""
        shape = {"drop_path_rate": self.drop_path, "in_chans": self.in_chans, "patch_size": self.patch_size}
        if (self.depths is None) != (self.dims is None):
            raise ValueError("`depths` and `dims` describe a custom size together; give both or neither")
        if self.depths is not None and self.dims is not None:
            return EncoderConfig(self.depths, self.dims, **shape)  # type: ignore[arg-type]
        return encoder_config(self.model or "", **shape)

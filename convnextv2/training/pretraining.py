"""Pre-training: masked images in, an encoder that can be fine-tuned out (ConvNeXt V2, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convnextv2.data.build import build_pretrain_dataset
from convnextv2.data.datasets import ImageDataset
from convnextv2.data.loading import derived_seed
from convnextv2.models.fcmae import FCMAE, create_fcmae
from convnextv2.training.device import Accelerator
from convnextv2.training.loop import OnLoss
from convnextv2.training.options import COMPILE_MODES, RunOptions
from convnextv2.training.pictures import reconstruction_panels, save_reconstructions
from convnextv2.training.recipe import option
from convnextv2.training.reporting import Log, Progress
from convnextv2.training.result import RunResult
from convnextv2.training.run import run_task
from convnextv2.training.run_folder import RunFolder
from convnextv2.training.task import Outcome, Task
from convnextv2.weights.loading import init_fcmae
from sparse_ops.grid import GRN_SCOPES
from sparse_ops.registry import registry

MASK_STREAM, PICTURE_SEED = 1, 0


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
        self.require("must not be negative", lambda value: value >= 0, "reconstruct_every")
        backend = registry().get(self.backend)
        if self.compile in COMPILE_MODES and backend is not None and not backend.traceable:
            raise ValueError(
                f"`compile`: the backend {backend.name} cannot be traced; use another `backend`, or leave it out"
            )


@dataclass(frozen=True, eq=False)
class PretrainResult(RunResult):
    """What a pre-training came to; ``model`` is the masked autoencoder."""

    model: FCMAE = field(repr=False)

    @property
    def first_loss(self) -> float:
        """Mean loss of the first epoch."""
        return self.metrics[0]["loss"]

    @property
    def last_loss(self) -> float:
        """Mean loss of the last epoch."""
        return self.metrics[-1]["loss"]


def pretrain(
    options: PretrainOptions, *, log: Log | None = None, progress: Progress | None = None, on_loss: OnLoss | None = None
) -> PretrainResult:
    """Run, or resume, a pre-training; arguments and what is raised as :func:`~convnextv2.training.run.run_task`."""
    return run_task(PretrainTask(options), PretrainResult, log=log, progress=progress, on_loss=on_loss)


class PretrainTask(Task[PretrainOptions]):
    """A masked autoencoder, unlabelled images, and the reconstruction loss of masked patches."""

    name = "pretrain"
    steep_lr = 1e-2, "published for large batches: `blr` 1.5e-4"

    def resolve(self, saved: dict[str, Any] | None) -> None:
        with torch.device("meta"):  # wrong options are to be told before a large folder is read
            self.model()
        self.metadata = {"epochs": self.options.epochs, "seed": self.options.seed}
        self.grouping = {"official_weight_decay": self.options.official_weight_decay}
        every, epochs = self.options.reconstruct_every, self.options.epochs
        if every != 0:
            step = every or max(1, math.ceil(epochs / 5))
            self.picture_epochs = [*range(step, epochs, step), epochs]

    def data(self) -> Sequence[ImageDataset]:
        o = self.options
        self._data = build_pretrain_dataset(
            o.data, o.size, o.encoder().in_chans, seed=o.seed, val_fraction=o.val_fraction, wanted=o.wanted
        )
        return [self._data]

    def model(self) -> FCMAE:
        o = self.options
        shared = ("backend", "grn_scope", "mask_ratio", "decoder_depth", "decoder_dim", "norm_pix_loss")
        return create_fcmae(o.encoder(), img_size=o.size, **{name: getattr(o, name) for name in shared})

    def initialise(self, model: FCMAE, resumed: bool) -> str:
        return "" if resumed or self.options.init is None else init_fcmae(model, str(self.options.init))

    def describe(self, model: nn.Module) -> str:
        return f"pre-training {sum(p.numel() for p in model.parameters()):,} parameters"

    def begin_epoch(self, accelerator: Accelerator, model: nn.Module, epoch: int) -> None:
        seed = derived_seed(self.options.seed, epoch, accelerator.process_index, MASK_STREAM)
        self._masks = torch.Generator(accelerator.device).manual_seed(seed)
        model.train()

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return model(batch, generator=self._masks, return_pred=False).loss, len(batch)

    def line(self, row: dict[str, Any]) -> str:
        return f"{super().line(row)}, feature diversity {row['feature_diversity']:.3f}"

    def pictures(self, folder: RunFolder, model: FCMAE, examples: Tensor, epoch: int, best: Outcome | None) -> None:
        if epoch in self.picture_epochs:
            generator = torch.Generator(examples.device).manual_seed(PICTURE_SEED)
            mean, std = self._data.mean, self._data.std
            with torch.compiler.set_stance("force_eager"):  # other shapes than those of training
                panels = reconstruction_panels(model, examples[:8], None, generator, mean=mean, std=std)
            save_reconstructions(folder.path / "reconstructions" / f"epoch_{epoch:04d}.png", *panels)

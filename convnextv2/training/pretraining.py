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
from convnextv2.data.reading import keep_no_data, progress_of, shown_statistics
from convnextv2.models.fcmae import FCMAE, create_fcmae
from convnextv2.models.no_data import parted
from convnextv2.training.draws import MASKS
from convnextv2.training.pictures import reconstruction_panels, save_reconstructions
from convnextv2.training.probing import ProbedTask
from convnextv2.training.reporting import Log, Progress
from convnextv2.training.result import RunResult
from convnextv2.training.run import run_task
from convnextv2.training.run_folder import RunFolder
from convnextv2.training.starting import from_init
from convnextv2.training.task import Outcome
from convnextv2.training.task_options import PretrainOptions
from convnextv2.training.watching import OnLoss
from convnextv2.weights.loading import init_fcmae

PICTURE_SEED = 0


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


class PretrainTask(ProbedTask[PretrainOptions]):
    """A masked autoencoder, unlabelled images, and the reconstruction loss of masked patches."""

    name = "pretrain"
    steep_lr = 1e-2, "published for large batches: `blr` 1.5e-4"

    def resolve(self, saved: dict[str, Any] | None) -> None:
        self.options, self._checkpoint = from_init(self.options, saved is not None)
        super().resolve(saved)
        self._read = self.options.reading(saved)
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
        drawn: dict[str, Any] = {"seed": o.seed, "val_fraction": o.val_fraction, "augmentation": o.augmentation()}
        self._data = build_pretrain_dataset(o.data, o.size, o.encoder().in_chans, **drawn, **self._read)
        self.progress, self._no_data = progress_of(self._data), keep_no_data(self._data)
        return self.probed(self._data)

    def model(self) -> FCMAE:
        o = self.options
        shared = ("backend", "grn_scope", "mask_ratio", "decoder_depth", "decoder_dim", "norm_pix_loss")
        return o.recomputing(create_fcmae(o.encoder(), img_size=o.size, **{name: getattr(o, name) for name in shared}))

    def initialise(self, model: FCMAE, resumed: bool) -> str:
        first, self._checkpoint = self._checkpoint, None
        return "" if first is None else init_fcmae(model, first, bands=self.options.init_bands)

    def describe(self, model: nn.Module) -> str:
        grid = "×".join(str(side // self.options.encoder().patch_size) for side in self.options.size)
        return f"pre-training {sum(p.numel() for p in model.parameters()):,} parameters, {grid} patches an image,"

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        patches = math.prod(self.options.size) // self.options.encoder().patch_size ** 2
        noise = self.draws.uniform(MASKS, patches, batch.device)
        images, valid = parted(batch) if self._no_data else (batch, None)
        return model(images, noise=noise, return_pred=False, valid=valid).loss, len(batch)

    def pictures(self, folder: RunFolder, model: FCMAE, examples: Tensor, epoch: int, best: Outcome | None) -> None:
        if epoch in self.picture_epochs:
            generator = torch.Generator(examples.device).manual_seed(PICTURE_SEED)
            mean, std = shown_statistics(self._data)
            with torch.compiler.set_stance("force_eager"):  # other shapes than those of training
                panels = reconstruction_panels(model, examples[:8], None, generator, mean=mean, std=std)
            save_reconstructions(folder.path / "reconstructions" / f"epoch_{epoch:04d}.png", *panels)

"""Training a network for segmentation, on the skeleton of every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnextv2.data.datasets import ImageDataset
from convnextv2.data.metadata import numbers_of
from convnextv2.data.reading import progress_of
from convnextv2.models.config import check_image_size
from convnextv2.segmentation.config import SegmenterConfig
from convnextv2.segmentation.datasets import build_segmentation_datasets, statistics_of
from convnextv2.segmentation.loading import encoder_of, init_segmenter
from convnextv2.segmentation.masks import IGNORED
from convnextv2.segmentation.network import Segmenter, library
from convnextv2.segmentation.options import SegmentOptions
from convnextv2.segmentation.scores import confusion_of, pixel_scores
from convnextv2.segmentation.transforms import PairAugmentation
from convnextv2.segmentation.windows import Windows, class_maps
from convnextv2.training import finetuning
from convnextv2.training.device import Accelerator
from convnextv2.training.optim import parameter_groups
from convnextv2.training.pictures import save_confusion_matrix
from convnextv2.training.reporting import Log, Progress
from convnextv2.training.result import ValidatedResult
from convnextv2.training.run import run_task
from convnextv2.training.run_folder import RunFolder
from convnextv2.training.task import Outcome, Task
from convnextv2.training.watching import OnLoss
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError, load_checkpoint


@dataclass(frozen=True, eq=False)
class SegmentResult(ValidatedResult):
    """What a run of segmentation came to; ``model`` is the network of the best epoch."""

    model: Segmenter = field(repr=False)

    @property
    def best_miou(self) -> float:
        """Mean intersection over union, in per cent, of the validation images."""
        return float(self.best["miou"])


def segment(
    options: SegmentOptions, *, log: Log | None = None, progress: Progress | None = None, on_loss: OnLoss | None = None
) -> SegmentResult:
    """Run, or resume, a training; arguments and what is raised as :func:`~convnextv2.training.run.run_task`, and
    ValueError where segmentation-models-pytorch is missing."""
    return run_task(SegmentTask(options), SegmentResult, log=log, progress=progress, on_loss=on_loss)


class SegmentTask(Task[SegmentOptions]):
    """An encoder with a decoder, images with masks, and cross entropy of every pixel."""

    name = "segment"
    loss_name = "train_loss"
    channels_last = True

    def resolve(self, saved: dict[str, Any] | None) -> None:
        library()
        o = self.options
        self._checkpoint: Checkpoint | None = None
        if o.init is not None and saved is None:
            self._checkpoint = load_checkpoint(o.init)
        start = None if self._checkpoint is None else encoder_of(self._checkpoint)
        blank: dict[str, Any] = {"init": start, **({"init_bands": None} if start is None and saved is not None else {})}
        found, _, statistics = finetuning.resolve(cast(Any, replace(o, **blank)))
        self.options = cast(SegmentOptions, replace(found, init=o.init, init_bands=o.init_bands))
        if saved is not None:
            mean, std = numbers_of(saved, "mean"), numbers_of(saved, "std")
            best = saved.get("best", {}).keys() if saved["epoch"] else {"miou", "accuracy", "epoch"}
            if mean is None or std is None or not {"miou", "accuracy", "epoch"} <= best:
                raise CheckpointError(f"{o.output}: its state is of no segmentation; name another `output`")
            statistics = mean, std
        mean, std = statistics or (None, None)
        self._read: dict[str, Any] = {"mean": mean, "std": std, **self.options.reading(saved)}
        self.ema_decay, self.ema_warmup, self.min_steps = o.ema_decay, o.ema_warmup, o.min_steps
        self.grouping = {"depths": self.options.encoder().depths}
        self.grouping |= {"layer_decay": o.layer_decay, "layer_decay_type": o.layer_decay_type}
        check_image_size(self.options.size, self.options.encoder().patch_size)

    def data(self) -> Sequence[ImageDataset]:
        o = self.options
        augmentation = PairAugmentation(o.scale, o.hflip, o.vflip or 0.0, o.color_jitter)
        drawn: dict[str, Any] = {"val_fraction": o.val_fraction, "seed": o.seed, "augmentation": augmentation}
        masks: dict[str, Any] = {"names": o.classes, "ignored": o.ignored, **self._read}
        *parts, self._classes = build_segmentation_datasets(o.data, o.size, o.encoder().in_chans, **drawn, **masks)
        training: ImageDataset = parts[0]
        self.files = {"class_indices.json": {str(i): name for i, name in enumerate(self._classes.names)}}
        self.progress = {"mean": training.mean, "std": training.std, **progress_of(training)}
        self._images = statistics_of(training)
        self._dice = library().losses.DiceLoss("multiclass", ignore_index=IGNORED) if o.dice else None
        return parts

    def model(self) -> Segmenter:
        o = self.options
        model = Segmenter(SegmenterConfig(o.encoder(), o.decoder, o.decoder_width, self._classes.names), o.backend)
        o.recomputing(model.encoder)
        return model

    def initialise(self, model: Segmenter, resumed: bool) -> str:
        if self._checkpoint is None:
            return "resuming" if resumed else "from scratch: no `init`"
        return init_segmenter(model, self._checkpoint, bands=self.options.init_bands)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        network = cast(Segmenter, model)
        rest = nn.ModuleList([network.norms, network.decoder, network.head])
        decay = self.options.weight_decay
        return parameter_groups(network.encoder, decay, **self.grouping) + parameter_groups(rest, decay)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        images, masks = batch
        logits, target = model(images).float(), masks.long()
        return image_losses(logits, target, self.options.smoothing, self.options.dice, self._dice).mean(), len(images)

    def evaluate(self, accelerator: Accelerator, model: nn.Module, loaders: Sequence[Any]) -> Outcome:
        confusion, images = validate(
            accelerator, model, loaders[0], len(self._classes.names), self._images, self.options
        )
        scores = pixel_scores(confusion, self._classes.names, images)
        self.metadata = {
            "val_miou": scores.miou,
            "val_iou": list(scores.iou),
            "ema": self.ema_decay > 0,
            "class_values": list(self._classes.values),
            "ignore_index": self._classes.ignored,
        }
        record = {"miou": scores.miou, "accuracy": scores.accuracy}
        return Outcome({"val_miou": scores.miou, "val_accuracy": scores.accuracy}, record, confusion)

    def rank(self, record: dict[str, float]) -> tuple[float, float]:
        return record["miou"], record["accuracy"]

    def line(self, row: dict[str, Any]) -> str:
        found = f"mIoU {row['val_miou']:.2f} %, pixel accuracy {row['val_accuracy']:.2f} %"
        return f"train loss {row['train_loss']:.4f}, {found}"

    def pictures(self, folder: RunFolder, model: Any, examples: Tensor, epoch: int, best: Outcome | None) -> None:
        if best is not None:
            save_confusion_matrix(folder.path / "confusion_matrix.png", best.details, self._classes.names)


def image_losses(logits: Tensor, target: Tensor, smoothing: float, weight: float, dice: Any) -> Tensor:
    """``[B]``: of each image by itself, whatever shares a batch with it, so that a run is the same in any number of
    processes: the mean cross entropy of its pixels of a class, 0 without any, and ``weight`` times its Dice loss.

    Args:
        logits: ``[B, K, H, W]``.
        target: ``[B, H, W]``, int64; :data:`~.masks.IGNORED` for pixels of no class.
        smoothing: of labels.
        weight, dice: of the library's loss, which is asked of one image at a time; None for none.
    """
    how: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": smoothing, "reduction": "none"}
    losses = F.cross_entropy(logits, target, **how).flatten(1).sum(1)
    losses = losses / (target != IGNORED).flatten(1).sum(1).clamp(min=1)
    if dice is None:
        return losses
    parts = zip(logits.split(1), target.split(1), strict=True)
    return losses + weight * torch.stack([dice(ours, wanted) for ours, wanted in parts])


@torch.no_grad()
def validate(
    accelerator: Accelerator, model: nn.Module, loader: Any, classes: int, statistics: Any, options: SegmentOptions
) -> tuple[Tensor, int]:
    """Confusion ``[K, K]`` of the pixels of all images of ``loader``, over all processes, and their number: whole
    images in their own pixels, by windows of the training's size, side by side."""
    model.eval()
    windows = Windows(options.size, overlap=0.0)

    def network(images: Tensor) -> Tensor:
        with accelerator.autocast():
            return model(images)

    confusion, count = torch.zeros(classes, classes, dtype=torch.int64), 0
    for batch in loader:
        images, masks = zip(*batch, strict=True)
        how: dict[str, Any] = {"batch_size": options.batch_size, "device": accelerator.device}
        maps = class_maps(network, images, statistics, windows, **how)
        found = torch.stack([confusion_of(ours, mask, classes) for ours, mask in zip(maps, masks, strict=True)])
        found = accelerator.gather_for_metrics(found.to(accelerator.device)).cpu()
        confusion += found.sum(0)
        count += len(found)
    return confusion, count

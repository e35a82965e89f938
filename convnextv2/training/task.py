"""What a run trains: the few things in which tasks differ. What they share is in :mod:`~convnextv2.training.run`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from convnextv2.data.datasets import ImageDataset
from convnextv2.training.device import Accelerator
from convnextv2.training.draws import Draws
from convnextv2.training.optim import parameter_groups
from convnextv2.training.options import RunOptions
from convnextv2.training.run_folder import RunFolder

O = TypeVar("O", bound=RunOptions)  # noqa: E741  # of options


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found; the best one of a run has a checkpoint of its own.

    Args:
        numbers: what goes into the row of the epoch, by its names there.
        record: what :meth:`Task.rank` compares; kept with the progress of the run, for one that is resumed.
        details: anything for the pictures.
    """

    numbers: dict[str, float]
    record: dict[str, float]
    details: Any = None


class Task(ABC, Generic[O]):
    """A network, its data and its loss; the rest has defaults.

    Methods are called in the order in which they stand here.

    Args:
        options: of the run; :meth:`resolve` may replace them.
    """

    name = "train"
    """Of the project in a tracker."""
    loss_name = "loss"
    """Of the training loss in ``metrics.jsonl``."""
    steep_lr: tuple[float, str] = math.inf, ""
    """Peak learning rate above which the user is told that it is steep, and what else to try."""
    channels_last = False
    """Whether batches and weights lie in memory with channels last on a GPU, as suits dense convolutions there."""
    ema_decay = 0.0
    """Above 0 the weights are averaged with this decay, and the average is evaluated and saved."""
    ema_warmup = True
    min_steps = 0
    """Updates of a run at least; an epoch passes through a small set as often as that takes."""
    picture_epochs: Sequence[int] = ()
    """Epochs (from 1) after which :meth:`pictures` is called for certain, beside the last one."""

    def __init__(self, options: O) -> None:
        self.options = options
        self.metadata: dict[str, Any] = {}  # what a checkpoint says beside normalisation, image size and epoch
        self.files: dict[str, Any] = {}  # JSON files that belong into the folder of the run: name and content
        self.progress: dict[str, Any] = {}  # what a resumed run has to know; resolve() gets it back
        self.draws: Draws  # numbers for the samples of the batch at hand, once the run is set up
        self.grouping: dict[str, Any] = {}  # what parameter_groups() is told beside the weight decay

    def resolve(self, saved: dict[str, Any] | None) -> None:
        """Fill open options and refuse wrong ones, before the data is read; ``saved`` is a resumed run's progress."""

    @abstractmethod
    def data(self) -> Sequence[ImageDataset]:
        """The part to train on, and any others to evaluate on."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A new network; its ``config`` is a dataclass of plain values. Feature diversity is measured in it, or in its
        ``encoder``, where that is an :class:`~convnextv2.models.encoder.Encoder`."""

    def initialise(self, model: Any, resumed: bool) -> str:
        """Give the network its first weights, unless the run is resumed; returns a line for the user, or nothing."""
        return ""

    def start(self, accelerator: Accelerator, model: Any, images: ImageDataset) -> str:
        """Fit to ``images`` what is not left to training, unless the run is resumed; returns a line for the user."""
        return ""

    def fit_batch(self, size: int) -> int:
        """The batch size, lowered to one that the task can take."""
        return size

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameters to train, as :func:`~convnextv2.training.optim.parameter_groups` makes them."""
        return parameter_groups(model, self.options.weight_decay, **self.grouping)

    def describe(self, model: nn.Module) -> str:
        """What is trained, for the line that a run begins with."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return f"training {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters"

    def begin_epoch(self, accelerator: Accelerator, model: nn.Module, epoch: int) -> None:
        """Set the network's mode."""
        model.train()

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """Loss ``[]`` of a batch on the device, and its number of images; ``model`` is the prepared network."""

    def evaluate(self, accelerator: Accelerator, model: nn.Module, loaders: Sequence[Any]) -> Outcome | None:
        """Measure the network on the other parts of the data; None where there is nothing to measure."""
        return None

    def after_epoch(self, accelerator: Accelerator, model: Any, row: dict[str, Any], say: Any) -> dict[str, float]:
        """More numbers for the row of an epoch, for all processes at once; ``say`` takes lines for the user."""
        return {}

    def rank(self, record: dict[str, float]) -> Any:
        """What orders the records of evaluations, the best last."""
        return tuple(record.values())

    def line(self, row: dict[str, Any]) -> str:
        """The row of an epoch in words, without its pace."""
        return f"{self.loss_name.replace('_', ' ')} {row[self.loss_name]:.4f}"

    def pictures(self, folder: RunFolder, model: Any, examples: Tensor, epoch: int, best: Outcome | None) -> None:
        """Draw, now and then.

        Args:
            folder: of the run, which has its loss curve already.
            model: the network.
            examples: ``[n, C, H, W]`` of the training part, on the device.
            epoch: from 1.
            best: outcome of the best epoch, unless that was before the run was resumed.
        """

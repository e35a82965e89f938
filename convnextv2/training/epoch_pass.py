"""One pass of a run through its training part, from where it was left: what is drawn, and what is saved meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from convnextv2.data.datasets import ImageDataset
from convnextv2.data.loading import EpochSampler
from convnextv2.training.compiling import Compiling
from convnextv2.training.diverged import written_if_diverged
from convnextv2.training.draws import Draws, dropping
from convnextv2.training.feeding import Feed
from convnextv2.training.keeping import Keeper
from convnextv2.training.loop import Loop
from convnextv2.training.so_far import SoFar
from convnextv2.training.task import Task


@dataclass
class EpochPass:
    """Everything drawn in a pass follows from the seed, the epoch, and the samples' places.

    Args:
        folder: of the run.
        task, loop, compiling, keeper: of the run, set up.
        images, sampler, loader: of the training part.
        each: samples that all processes have in a batch.
        progress: from the number of epochs done, and what the next has come to, to what a state says.
        so_far: what the next pass has come to.
    """

    folder: Path
    task: Task[Any]
    loop: Loop
    compiling: Compiling
    keeper: Keeper
    images: ImageDataset
    sampler: EpochSampler
    loader: Feed
    each: int
    progress: Callable[[int, dict[str, Any] | None], dict[str, Any]]
    so_far: SoFar = field(default_factory=SoFar)

    @property
    def draws(self) -> Draws:
        """Numbers for the samples of the batch at hand."""
        return self.task.draws

    def resume(self, saved: dict[str, Any], say: Callable[[str], None]) -> None:
        """Go on where the run was left, in its schedule too, whatever number of updates its epochs had before.

        Raises ValueError if ``seed`` is another one: the split of the images and their order follow from it.
        """
        options, self.loop.step = self.task.options, saved["step"]
        if (seed := saved.get("seed", options.seed)) != options.seed:
            raise ValueError(f"`seed` {options.seed} would split and order the images anew: keep {seed}, or start anew")
        self.so_far = SoFar(**saved.get("inside") or {})
        taken = saved["epoch"] * len(self.sampler) * options.views + self.so_far.images
        self.loop.ahead = self.loop.step - taken // (self.each * options.accum)
        if self.loop.ahead:
            say("notice: epochs had another number of steps before; the learning rate goes on where it was in the run")

    def begin(self, epoch: int) -> None:
        """Go to where the epoch was left. Raises RunStoppedError if the run has been asked to stop."""
        self.keeper.answer(self.keeper.asked(), epoch, self.loop.step if self.so_far.batches else None)
        self.draws.begin(epoch, self.so_far.images)
        self.sampler.epoch, self.sampler.start = epoch, self.so_far.images // self.task.options.views
        self.images.set_epoch(epoch)
        self.loader.set_epoch(epoch)  # accelerate's own count, handed to the data set, starts anew on resuming
        self.task.begin_epoch(self.loop.accelerator, self.loop.model, epoch)

    def train(self, epoch: int, batches: Any) -> dict[str, float]:
        """Train on the batches that are left, for the row of the epoch; raises as :meth:`Loop.epoch`."""
        so_far, draws, waited = self.so_far, self.draws, self.so_far.waited

        def loss_of(batch: Any) -> tuple[Tensor, int]:
            draws.begin(epoch, so_far.images)
            drop(draws)
            return self.compiling.loss(self.task.loss, batch)

        def between(complete: Callable[[], None]) -> None:
            if asked := self.keeper.asked(self.loop.step):
                complete()
                so_far.waited = waited + self.loader.waited
                self.keeper.save(self.progress(epoch, asdict(so_far)))
                self.keeper.answer(asked, epoch, self.loop.step)

        told = self.folder, self.loop.watch, self.loop.model, self.images.source, self.sampler
        with dropping(self.loop.model) as drop, written_if_diverged(*told, self.each // self.task.options.views):
            row = self.loop.epoch(epoch, so_far, batches, loss_of, between)
        self.so_far = SoFar()
        return {**row, "data_wait": self.loader.share(row["seconds"], waited)}

"""One epoch: schedule, forward, backward, update."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from convnextv2.training.device import Accelerator
from convnextv2.training.so_far import SoFar
from convnextv2.training.watching import Watch

LossOf = Callable[[Any], tuple[Tensor, int]]


@dataclass
class Loop:
    """Steps of training; a loss that is not finite ends the run.

    Args:
        accelerator: what ``model`` and ``optimizer`` were prepared by.
        schedule: from :func:`~convnextv2.training.optim.create_schedule`.
        watch: over losses and gradients. Its ``on_loss`` is called for every batch with the number of updates made
            before it and its loss, over all processes, as soon as that is read: at once on a processor, every
            :data:`~convnextv2.training.watching.LOSS_CHECK_EVERY` batches on a GPU.
        after_update: called with the number of updates made so far after each.
        step, ahead: updates made so far; and more than in the schedule, where epochs once had another number of them.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    schedule: Any
    watch: Watch
    after_update: Callable[[int], None] | None = None
    step: int = 0
    ahead: int = 0

    def epoch(
        self,
        done: int,
        so_far: SoFar,
        batches: Any,
        loss_of: LossOf,
        between: Callable[[Callable[[], None]], None] = lambda complete: None,
    ) -> dict[str, float]:
        """Train on every batch once.

        Args:
            done: epochs finished before.
            so_far: what the epoch has come to, which is added to.
            batches: sized iterable, perhaps in a progress bar with tqdm's ``set_postfix_str``.
            loss_of: from a batch to its loss and its number of images.
            between: called after each update with what completes ``so_far``, which reads the losses.

        Returns:
            For the row of the epoch: mean loss, learning rate, norm of the gradient and pace, over all processes.

        Raises DivergedError if a loss or a weight is not finite, and what ``between`` does.
        """
        start, before, watch = time.perf_counter(), so_far.seconds, self.watch
        watch.begin(done)

        def complete() -> None:
            watch.read(so_far)
            so_far.seconds = before + time.perf_counter() - start

        self.schedule.step_update(max(self.step - self.ahead - 1, 0))  # for the row, if nothing is left of the epoch
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                self.schedule.step_update(self.step - self.ahead)
                loss, size = loss_of(batch)
                kept = loss.detach().clone()  # the memory of a CUDA graph's output is used again
                self.accelerator.backward(loss)
                if taken := watch.takes(self.step, kept, so_far):
                    self.optimizer.step()
                self.optimizer.zero_grad()
            so_far.batches += 1
            so_far.images += size * self.accelerator.num_processes
            if hasattr(batches, "set_postfix_str"):
                batches.set_postfix_str(f"loss {so_far.mean:.4f}", refresh=False)
            if not self.accelerator.sync_gradients:
                continue
            self.step += 1
            if taken and self.after_update is not None:
                self.after_update(self.step)
            between(complete)
        complete()
        watch.check_weights(self.step)  # the last update has no loss after it that would show that it went wrong
        pace = {"seconds": round(so_far.seconds, 3), "images_per_s": round(so_far.images / so_far.seconds, 1)}
        return {**watch.row(so_far), **pace}

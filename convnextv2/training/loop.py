"""One epoch: schedule, forward, backward, update, and what is not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convnextv2.training.device import Accelerator
from convnextv2.training.signals import StopSignals

LOSS_CHECK_EVERY = 20
"""Batches between two looks at the losses on a GPU, where each look waits for it."""

OnLoss = Callable[[int, float], None]
LossOf = Callable[[Any], tuple[Tensor, int]]


class DivergedError(ValueError):
    """The loss or the weights are no longer finite; the message says where and what to try."""


@dataclass
class Loop:
    """Steps of training: schedule, forward, backward, clip, update; a loss that is not finite ends the run.

    Args:
        accelerator: what ``model`` and ``optimizer`` were prepared by.
        schedule: from :func:`~convnextv2.training.optim.create_schedule`.
        stop: signals.
        clip_grad: largest norm of the gradient, or None.
        on_loss: called for every batch with the number of updates made before it and its loss in this process, as soon
            as that is read: at once on a processor, every :data:`LOSS_CHECK_EVERY` batches on a GPU.
        after_update: called with the number of updates made so far after each.
        step: updates made so far.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    schedule: Any
    stop: StopSignals
    clip_grad: float | None = None
    on_loss: OnLoss | None = None
    after_update: Callable[[int], None] | None = None
    step: int = 0

    def __post_init__(self) -> None:
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._check_every = 1 if self.accelerator.device.type == "cpu" else LOSS_CHECK_EVERY

    def epoch(self, done: int, batches: Any, loss_of: LossOf) -> tuple[float, dict[str, float]]:
        """Train on every batch once.

        Args:
            done: epochs finished before.
            batches: sized iterable, perhaps in a progress bar with tqdm's ``set_postfix_str``.
            loss_of: from a batch to its loss and its number of images.

        Returns:
            Mean loss, and for the row of the epoch the last learning rate and the pace, over all processes.

        Raises DivergedError if a loss or a weight is not finite, RunStoppedError if a signal came.
        """
        start = time.perf_counter()
        total, count, images, lr = 0.0, 0, 0, 0.0
        pending: list[tuple[int, Tensor]] = []
        for batch in batches:
            self.stop.check(done)
            with self.accelerator.accumulate(self.model):
                self.schedule.step_update(self.step)
                lr = max(group["lr"] for group in self.optimizer.param_groups)
                loss, size = loss_of(batch)
                # The memory of a CUDA graph's output is used again.
                pending.append((self.step, loss.detach().clone()))
                self.accelerator.backward(loss)
                if self.clip_grad is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self._trained, self.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
            count += 1
            images += size
            if self.accelerator.sync_gradients:
                self.step += 1
                if self.after_update is not None:
                    self.after_update(self.step)
            if len(pending) >= self._check_every:
                total += self._sum(pending, done, lr)
                pending = []
                if hasattr(batches, "set_postfix_str"):
                    batches.set_postfix_str(f"loss {total / count:.4f}", refresh=False)
        if pending:
            total += self._sum(pending, done, lr)
        # The last update has no loss after it that would show that it went wrong.
        if not torch.isfinite(torch.stack(torch._foreach_norm([p.detach() for p in self._trained]))).all():
            raise self._diverged("weights are not finite", self.step, done, lr)
        seconds = time.perf_counter() - start
        sums = torch.tensor([total, count, images], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.float().to(self.accelerator.device), "sum").cpu()
        total, count, images = sums.tolist()
        return total / count, {"lr": lr, "seconds": round(seconds, 3), "images_per_s": round(images / seconds, 1)}

    def _sum(self, losses: list[tuple[int, Tensor]], done: int, lr: float) -> float:
        values = torch.stack([loss for _, loss in losses]).double().tolist()
        for (step, _), value in zip(losses, values, strict=True):
            if not math.isfinite(value):
                raise self._diverged(f"the loss is {value}", step, done, lr)
            if self.on_loss is not None:
                self.on_loss(step, value)
        return sum(values)

    def _diverged(self, what: str, step: int, done: int, lr: float) -> DivergedError:
        kept = f"the checkpoint of epoch {done} is kept" if done else "no checkpoint was written yet"
        return DivergedError(
            f"{what} at step {step} (epoch {done + 1}, learning rate {lr:.2e}); {kept}: try a smaller `blr`, more "
            "`warmup_epochs`, `clip_grad` 1, or another `precision`"
        )

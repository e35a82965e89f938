"""What a run's losses and gradients say while it trains: read now and then, and looked at for what is not finite."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convnextv2.training.device import Accelerator
from convnextv2.training.exchange import Exchange
from convnextv2.training.sharding import full
from convnextv2.training.so_far import SoFar

LOSS_CHECK_EVERY = 20
"""Batches between two looks at the losses on a GPU, where each look waits for it."""
NORM_EVERY = 10
"""Updates between two norms of the gradient, where nothing else asks for it."""

OnLoss = Callable[[int, float], None]


class DivergedError(ValueError):
    """The loss or the weights are no longer finite; the message says where and what to try."""

    step = 0
    batch: int | None = None
    """Number in its epoch, from 0, of the batch whose loss it was."""


@dataclass
class Watch:
    """Looks at the losses of all processes, and at the norm of the gradient.

    Args:
        accelerator, exchange: of the processes.
        optimizer: that trains ``parameters``.
        clip_grad: largest norm of the gradient, or None.
        most_skipped: updates that may be left out because their gradient is not finite.
        on_loss: see :class:`~convnextv2.training.loop.Loop`.
        skipped: updates left out so far.
        recent: numbers of the last updates, with losses and norms of the gradient.
    """

    accelerator: Accelerator
    exchange: Exchange
    optimizer: Any
    parameters: Sequence[nn.Parameter]
    clip_grad: float | None = None
    most_skipped: int = 0
    on_loss: OnLoss | None = None
    skipped: int = 0
    recent: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=20))
    done: int = 0

    def __post_init__(self) -> None:
        self._every = 1 if self.accelerator.device.type == "cpu" else LOSS_CHECK_EVERY
        self._pending: list[tuple[int, int, Tensor, Tensor | None]] = []

    def begin(self, done: int) -> None:
        """``done`` epochs are finished."""
        self.done, self._pending = done, []

    def takes(self, step: int, loss: Tensor, so_far: SoFar) -> bool:
        """Whether the update is made, after ``step`` others, whose gradient is there now; clips it.

        One with a gradient that is not finite is left out if that is asked for. A gradient scaler leaves those out
        itself, and lowers its scale: they count here where the scale is below 1, and the gradient not merely too large
        for 16 bits. Raises DivergedError.
        """
        norm = self._norm(step)
        self._pending.append((step, so_far.batches, loss, norm))
        if len(self._pending) >= self._every:
            self.read(so_far)
        if norm is None or not self.most_skipped or torch.isfinite(norm):
            return True
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1:
            return True
        self.skipped += 1
        if self.skipped > self.most_skipped:
            raise self.diverged(f"{self.skipped} gradients were not finite, the last", step)
        return scaler is not None

    def _norm(self, step: int) -> Tensor | None:
        """Of the gradient that the optimizer is about to use, where it is asked for."""
        if not self.accelerator.sync_gradients:
            return None
        if self.clip_grad is not None:
            return full(self.accelerator.clip_grad_norm_(self.parameters, self.clip_grad))
        if not self.most_skipped and step % NORM_EVERY:
            return None
        self.accelerator.unscale_gradients()
        return full(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def read(self, so_far: SoFar) -> None:
        """Add up the losses and norms that wait to be read. Raises DivergedError."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        values = self.exchange.mean(torch.stack([loss for _, _, loss, _ in pending]).double().tolist())
        for (step, batch, _, norm), value in zip(pending, values, strict=True):
            length = None if norm is None else float(norm)
            self.recent.append({"step": step, "loss": value, **({} if length is None else {"gradient_norm": length})})
            if length is not None and math.isfinite(length):
                so_far.norm, so_far.norms = so_far.norm + length, so_far.norms + 1
            if self.on_loss is not None:
                self.on_loss(step, value)
            if math.isfinite(value):
                so_far.loss, so_far.losses = so_far.loss + value, so_far.losses + 1
            elif not self.most_skipped:
                raise self.diverged(f"the loss is {value}", step, batch)

    def check_weights(self, step: int) -> None:
        """Raise DivergedError if a weight is not finite."""
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.parameters]))
        if not torch.isfinite(full(norms)).all():
            raise self.diverged("weights are not finite", step)

    def row(self, so_far: SoFar) -> dict[str, float]:
        """For the row of an epoch: mean loss, learning rate, mean norm of the gradient."""
        norm = {"gradient_norm": so_far.norm / so_far.norms} if so_far.norms else {}
        left_out = {"skipped": self.skipped} if self.skipped else {}
        return {"loss": so_far.mean, "lr": self.lr, **norm, **left_out}

    @property
    def lr(self) -> float:
        """The highest learning rate of the optimizer's groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def diverged(self, what: str, step: int, batch: int | None = None) -> DivergedError:
        """The error that says so."""
        kept = f"the checkpoint of epoch {self.done} is kept" if self.done else "no checkpoint was written yet"
        error = DivergedError(
            f"{what} at step {step} (epoch {self.done + 1}, learning rate {self.lr:.2e}); {kept}: try a smaller `blr`, "
            "more `warmup_epochs`, `clip_grad` 1, or another `precision`"
        )
        error.step, error.batch = step, batch
        return error

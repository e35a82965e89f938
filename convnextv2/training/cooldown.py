"""The schedule of the learning rate that a run asks for, among them one that stays and is cooled down at its end.

A constant rate needs no length beforehand: a run of it goes on for as long as it pays, and ends in a cooldown, in which
most of what a whole schedule would have brought is made up (Hägele et al., arXiv 2405.18392).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SCHEDULES = ("cosine", "constant")


def check_schedule(options: Any) -> None:
    """Raise ValueError where schedule and cooldown do not fit each other or the run."""
    options.require(f"must be one of {', '.join(SCHEDULES)}", SCHEDULES.__contains__, "schedule")
    if options.cooldown_epochs and options.schedule == "cosine":
        raise ValueError("`cooldown_epochs` is for `schedule` constant; a cosine falls over the whole run")
    if options.cooldown_epochs > options.epochs:
        raise ValueError(
            f"`cooldown_epochs` {options.cooldown_epochs:g} is more than `epochs` {options.epochs}, which counts the "
            "epochs of a resumed run, too"
        )


def schedule_of(options: Any, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Any:
    """timm's schedule per update: cosine as :func:`~convnextv2.training.optim.create_schedule` makes it, or constant.

    A constant one rises linearly from 0 over the warm-up, at most half of what comes before the cooldown, stays, and
    falls linearly to ``min_lr`` over the last ``cooldown_epochs``. Call ``step_update(n)`` before update n, counted
    from 0. Nothing but n and the end of the run matters, so a run is resumed with more epochs and a cooldown.

    Raises ValueError if ``min_lr`` is above the rate of ``optimizer``.
    """
    if options.min_lr > (peak := max(group["lr"] for group in optimizer.param_groups)):
        raise ValueError(f"`min_lr` {options.min_lr:g} is above the peak learning rate, {peak:g}")
    if options.schedule == "cosine":
        from convnextv2.training.optim import create_schedule  # with torch, as timm: not for --help

        return create_schedule(optimizer, updates_per_epoch, options.epochs, options.warmup_epochs, options.min_lr)
    from timm.scheduler.scheduler import Scheduler

    total, cooldown = updates_per_epoch * options.epochs, round(options.cooldown_epochs * updates_per_epoch)
    warmup = min(round(options.warmup_epochs * updates_per_epoch), (total - cooldown) // 2)

    class Constant(Scheduler):
        def _get_lr(self, t: int) -> list[float]:
            if t < warmup:
                return [rate * t / warmup for rate in self.base_values]
            share = min(max(total - t, 0) / cooldown, 1) if cooldown else 1.0
            return [options.min_lr + (rate - options.min_lr) * share for rate in self.base_values]

    return Constant(optimizer, "lr", t_in_epochs=False)

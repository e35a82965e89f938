"""A linear probe: final norm and head alone, on a frozen encoder in evaluation mode."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from convnextv2.training.classification import ClassifierTask, FinetuneOptions, FinetuneResult
from convnextv2.training.loop import OnLoss
from convnextv2.training.reporting import Log, ProgressBar
from convnextv2.training.run import run_task

if TYPE_CHECKING:
    from accelerate import Accelerator


def linear_probe(
    options: FinetuneOptions,
    *,
    log: Log | None = None,
    progress: ProgressBar | None = None,
    on_loss: OnLoss | None = None,
) -> FinetuneResult:
    """Run, or resume, a linear probe of the checkpoint ``init``, whatever ``options.linear_probe`` says.

    Arguments and what is raised as :func:`~convnextv2.training.run.run_task`.
    """
    task = ProbeTask(replace(options, linear_probe=True))
    return run_task(task, FinetuneResult, log=log, progress=progress, on_loss=on_loss)


class ProbeTask(ClassifierTask):
    """A classifier of which the encoder is not trained."""

    def resolve(self, saved: dict[str, Any] | None) -> None:
        if self.options.init is None:
            raise ValueError("--linear-probe needs --init: the head of a frozen random encoder is not worth training")
        super().resolve(saved)

    def initialise(self, model: nn.Module, resumed: bool) -> str:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.split(".")[0] in ("norm", "head")
        return super().initialise(model, resumed)

    def begin_epoch(self, accelerator: Accelerator, model: nn.Module, epoch: int) -> None:
        model.eval()

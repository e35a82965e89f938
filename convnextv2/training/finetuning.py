"""Fine-tuning: the whole of a classifier, or with ``linear_probe`` its head alone."""

from __future__ import annotations

from convnextv2.training.classification import ClassifierTask, FinetuneOptions, FinetuneResult
from convnextv2.training.loop import OnLoss
from convnextv2.training.probing import linear_probe
from convnextv2.training.reporting import Log, ProgressBar
from convnextv2.training.run import run_task


def finetune(
    options: FinetuneOptions,
    *,
    log: Log | None = None,
    progress: ProgressBar | None = None,
    on_loss: OnLoss | None = None,
) -> FinetuneResult:
    """Run, or resume, a fine-tuning; arguments and what is raised as :func:`~convnextv2.training.run.run_task`."""
    if options.linear_probe:
        return linear_probe(options, log=log, progress=progress, on_loss=on_loss)
    return run_task(ClassifierTask(options), FinetuneResult, log=log, progress=progress, on_loss=on_loss)

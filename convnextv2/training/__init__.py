"""Runs: pre-training, fine-tuning, linear probes, and the skeleton for other tasks."""

from convnextv2.deferred import deferred

__getattr__, __dir__, __all__ = deferred(
    __name__,
    {
        "finetuning": "FinetuneResult finetune linear_probe",
        "pretraining": "PretrainResult pretrain",
        "result": "Metrics RunResult",
        "run": "run_task",
        "signals": "RunStoppedError",
        "task": "Outcome Task",
        "task_options": "FinetuneOptions PretrainOptions",
    },
)

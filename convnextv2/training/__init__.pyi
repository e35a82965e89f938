from convnextv2.training.finetuning import FinetuneResult, finetune, linear_probe
from convnextv2.training.pretraining import PretrainResult, pretrain
from convnextv2.training.result import Metrics, RunResult
from convnextv2.training.run import run_task
from convnextv2.training.signals import RunStoppedError
from convnextv2.training.task import Outcome, Task
from convnextv2.training.task_options import FinetuneOptions, PretrainOptions

# The formatter would give every name a line of its own.
__all__ = [
    "FinetuneOptions", "FinetuneResult", "Metrics", "Outcome", "PretrainOptions", "PretrainResult", "RunResult",
    "RunStoppedError", "Task", "finetune", "linear_probe", "pretrain", "run_task",
]  # fmt: skip

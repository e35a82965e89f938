"""A head start in every process of the launcher, each with an encoder of its own: head_start_run.py FOLDER DATA. FOLDER
gets the head of each."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from train_helpers import finetune_options

from convnextv2.training.finetuning import ClassifierTask

if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(accelerator.process_index)
    task = ClassifierTask(finetune_options(sys.argv[2], Path(sys.argv[1]), head_start=True))
    task.resolve(None)
    images, _ = task.data()
    model = task.model()
    task.start(accelerator, model, images)
    torch.save(model.head.state_dict(), Path(sys.argv[1]) / f"{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()

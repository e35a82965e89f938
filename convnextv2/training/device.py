"""Device and precision, through accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convnextv2.training.options import RunOptions
from convnextv2.training.processes import after_a_restart, tracker_of

if TYPE_CHECKING:
    from accelerate import Accelerator
else:
    Accelerator = Any  # importing it takes a second, so only a run does


def make_accelerator(options: RunOptions) -> Accelerator:
    """accelerate's entry for what the options ask for; ValueError if device or precision cannot be used here."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration

    kind, _, index = options.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"`device` must be auto, cpu, cuda or cuda:N, got {options.device!r}")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("`device` cuda: torch finds no CUDA device here; use `device` cpu")
        if int(index or 0) >= torch.cuda.device_count():
            raise ValueError(f"`device` {options.device}: there are {torch.cuda.device_count()} CUDA devices")
        if index:
            torch.cuda.set_device(int(index))
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = options.tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    # Without an accelerator, accelerate joins the processes of a launcher only if told that they run on processors;
    # otherwise each would train by itself, all into the same folder.
    settings: dict[str, Any] = {
        "cpu": kind == "cpu" or not torch.accelerator.is_available(),
        "mixed_precision": mixed_precision(options),
        "gradient_accumulation_steps": options.accum,
        "log_with": tracker_of(options.tracker),
        "project_dir": options.output,
        "kwargs_handlers": after_a_restart(options.timeout_minutes),
        "dataloader_config": DataLoaderConfiguration(non_blocking=True),  # from pinned memory
    }
    try:
        return Accelerator(**settings)
    except ValueError:  # accelerate holds on to the device and precision of an earlier run in this process
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(**settings)


def mixed_precision(options: RunOptions) -> str:
    """The precision asked for, with auto resolved: bfloat16 on a CUDA device that computes in it, float32 elsewhere."""
    if options.precision != "auto":
        return options.precision
    on_cuda = not options.device.startswith("cpu") and torch.cuda.is_available()
    return "bf16" if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "no"

"""Options of the hardware that a run is trained on, and which of them exclude each other."""

from __future__ import annotations

from typing import Any

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
COMPILE_CHOICES = ("auto", "none", *COMPILE_MODES)  # None is none, as in recipes of before
SHARDINGS = ("none", "full")
SHARDED_OPTIMIZERS = ("adamw", "adam")
"""Those that update each number by itself, in torch's own code, which computes on shards."""


def check_hardware(options: Any) -> None:
    """Raise ValueError on ways to compute that are unknown, or that exclude each other or another option."""
    options.require(f"must be one of {', '.join(COMPILE_CHOICES)}", COMPILE_CHOICES.__contains__, "compile")
    options.require(f"must be one of {', '.join(SHARDINGS)}", SHARDINGS.__contains__, "sharding")
    if options.compile in COMPILE_MODES[1:] and options.accum > 1:
        raise ValueError(
            f"`compile` {options.compile} and `accum` exclude each other: a CUDA graph overwrites the gradients of "
            "the batch before; use `compile` default"
        )
    if options.sharding == "none":
        return
    problems = {
        f"`compile` {options.compile} exclude each other; use `compile` none": options.compile in COMPILE_MODES,
        "`precision` fp16 exclude each other; use `precision` bf16": options.precision == "fp16",
        f"`optimizer` {options.optimizer} exclude each other; use one of {', '.join(SHARDED_OPTIMIZERS)}": (
            options.optimizer not in SHARDED_OPTIMIZERS
        ),
    }
    for problem in [problem for problem, found in problems.items() if found]:
        raise ValueError(f"`sharding` {options.sharding} and {problem}")

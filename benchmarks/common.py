"""What the benchmarks share: options, the hardware they ran on, agreement, passes timed in turns, reports."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnextv2.files import write_json
from convnextv2.models.config import VARIANTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-2, "float16": 2e-2}
"""Largest difference of outputs and gradients, relative to the largest value of the dense ones, through a whole
network: a wrong tap or mask gives differences of order 1."""


def add_options(parser: argparse.ArgumentParser, models: Sequence[str], batch_size: int = 16) -> None:
    """Options that every benchmark has."""
    parser.add_argument("--models", nargs="+", default=list(models), help="variants, atto … huge")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images a batch")
    parser.add_argument(
        "--img-size", type=int, nargs="+", default=[224], help="pixels: one number, or height and width"
    )
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each contender")
    parser.add_argument("--warmup", type=int, default=2, help="passes before timing")
    parser.add_argument("--threads", type=int, help="processor threads; torch's default if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write hardware, versions and results to this file")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Bring options into their final form; ends the program on values out of range."""
    args.img_size = tuple(args.img_size * 2 if len(args.img_size) == 1 else args.img_size)
    args.models = [m if m.startswith("convnextv2_") else f"convnextv2_{m}" for m in args.models]
    unknown = [m for m in args.models if m not in VARIANTS]
    if unknown:
        parser.error(f"unknown models {', '.join(unknown)}; choose from {', '.join(VARIANTS)}")
    if args.batch_size < 1 or args.repeats < 1:
        parser.error("--batch-size and --repeats must be at least 1")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    if args.threads:
        torch.set_num_threads(args.threads)


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    facts = {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        import triton

        facts |= {"cuda": torch.version.cuda, "triton": triton.__version__}
    return facts


def same_arithmetic(device: torch.device) -> dict[str, Any]:
    """On CUDA: float32 is float32 everywhere, and cuDNN tries its algorithms, as one who trains a dense network does.

    Returns:
        What was set, to be told beside the hardware; nothing elsewhere.
    """
    if device.type != "cuda":
        return {}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    return {"tf32": "off", "cudnn_benchmark": "on"}


def print_facts(facts: dict[str, Any]) -> None:
    """Hardware and versions in a line."""
    print(", ".join(f"{key} {value}" for key, value in facts.items()))


def print_head(facts: dict[str, Any], args: argparse.Namespace, dtype: str) -> None:
    """What was measured where, above the table."""
    print_facts(facts)
    print(f"batch {args.batch_size}, {args.img_size[0]}×{args.img_size[1]}, mask ratio {args.mask_ratio}, {dtype}")


def write_report(facts: dict[str, Any], args: argparse.Namespace, results: Sequence[Any]) -> None:
    """Hardware, options and results (dataclasses) as JSON, where ``--json`` asks for it.

    Atomically, so that it can be called whenever something was measured. Of a path its last two names: results are
    published, and somebody's folders are not.
    """
    if args.json is not None:
        given = {k: v for k, v in vars(args).items() if k != "json"}
        options = {k: str(Path(*v.parts[-2:])) if isinstance(v, Path) else v for k, v in given.items()}
        write_json(args.json, {"hardware": facts, "options": options, "results": [asdict(r) for r in results]})


PEAK_FLOPS = {
    ("H100", "bfloat16"): 989e12,
    ("H200", "bfloat16"): 989e12,
    ("A100", "bfloat16"): 312e12,
    ("H100", "float32"): 67e12,
    ("H200", "float32"): 67e12,
    ("A100", "float32"): 19.5e12,
}
"""Floating-point operations a second of the SXM modules, without sparsity and TF32, from NVIDIA's data sheets."""


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The data sheet's figure for a device that is known here, else None; float16 is as fast as bfloat16."""
    if device.type != "cuda":
        return None
    name, kind = torch.cuda.get_device_name(device), "bfloat16" if dtype == "float16" else dtype
    return next((flops for (part, known), flops in PEAK_FLOPS.items() if part in name and known == kind), None)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Contender:
    """One implementation: runs a pass, keeps its times.

    Args:
        name: what the table calls it.
        forward: returns the tensor that is differentiated, and the output that is compared.
        parameters: what gradients are taken for.
        update: the optimiser's step, or None.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[], tuple[Tensor, Tensor]],
        parameters: list[Tensor],
        update: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.forward = forward
        self.parameters = parameters
        self.update = update
        self.times_ms: list[float] = []

    def clear(self, keep: bool = False) -> None:
        """Drop the gradients, as an optimiser does before a step; with ``keep`` set them to zero instead."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter) if keep else None

    def run(self) -> None:
        loss, _ = self.forward()
        loss.backward()
        if self.update is not None:
            self.update()

    def values(self) -> list[Tensor]:
        """Output and gradients of one pass."""
        self.clear()
        loss, output = self.forward()
        loss.backward()
        return [output.detach().clone(), *(p.grad.clone() for p in self.parameters if p.grad is not None)]

    def time(self, device: torch.device) -> None:
        self.clear()
        synchronise(device)
        start = time.perf_counter()
        self.run()
        synchronise(device)
        self.times_ms.append((time.perf_counter() - start) * 1e3)


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference over all pairs, each relative to the largest value of the second."""
    return max(
        ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12)).item()
        for a, b in zip(ours, theirs, strict=True)
    )


def compare(contender: Contender, expected: list[Tensor], dtype: str) -> tuple[float | None, str | None]:
    """Runs it once: its largest relative difference from ``expected``, and why it gets no ratio, or None."""
    try:
        error = relative_error(contender.values(), expected)
    except Exception as failure:  # a compiler's or the device's; the others are measured all the same
        return None, first_line(failure)
    if error <= TOLERANCE[dtype]:
        return error, None
    return error, f"differs from dense masked by {error:.1e}, so there is no ratio"


def first_line(failure: Exception) -> str:
    """An exception in a line."""
    reason = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {reason[0][:300]}"


def agreement(
    contenders: list[Contender], dense: Contender, dtype: str, what: str
) -> tuple[list[Contender], dict[str, float], list[str]]:
    """Runs each contender once.

    Returns:
        Those that end and agree with ``dense`` to the tolerance of ``dtype``, it included; their largest relative
        differences of outputs and gradients; a line for each of the others, which get no ratio.
    """
    expected = dense.values()
    agreeing, errors, failures = [dense], {}, []
    for contender in contenders:
        if contender is dense:
            continue
        error, failure = compare(contender, expected, dtype)
        if failure is not None:
            failures.append(f"{what}, {contender.name}: {failure}")
        elif error is not None:
            agreeing.append(contender)
            errors[contender.name] = error
    return [c for c in contenders if c in agreeing], errors, failures


def warm_up(contender: Contender, passes: int) -> None:
    """Passes that are not timed."""
    for _ in range(passes):
        contender.clear()
        contender.run()


def time_in_turns(contenders: list[Contender], args: argparse.Namespace) -> None:
    """Warm up, then time all contenders in turns, so that a drift of the machine hits them alike."""
    for contender in contenders:
        warm_up(contender, args.warmup)
    for _ in range(args.repeats):
        for contender in contenders:
            contender.time(torch.device(args.device))

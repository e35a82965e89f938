"""A fine-tuning step of the dense classifier: channels-last, autocast to bfloat16 on CUDA, eager and compiled.

python benchmarks/finetune_step.py --models tiny base --batch-size 128 --device cuda --json finetune.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from common import (
    Contender,
    add_options,
    check_options,
    first_line,
    hardware,
    print_head,
    same_arithmetic,
    time_in_turns,
    warm_up,
    write_report,
)
from match import peak_activation_bytes
from torch import Tensor

from convnextv2.models.classifier import create_model


@dataclass
class Result:
    """Forward and backward pass with AdamW of one batch, per image."""

    model: str
    how: str
    ms_per_image: float | None = None
    ms_per_image_min: float | None = None
    ms_per_image_max: float | None = None
    images_per_s: float | None = None
    activation_mb: float | None = None
    note: str | None = None
    times_ms: list[float] = field(default_factory=list)


def contender(args: argparse.Namespace, name: str, how: str) -> Contender:
    """The step, eager or compiled."""
    device = torch.device(args.device)
    model = create_model(name, num_classes=1000).to(device, memory_format=torch.channels_last)
    images = torch.randn(args.batch_size, 3, *args.img_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (args.batch_size,), device=device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    run = torch.compile(model) if how == "compiled" else model

    def forward() -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = run(images)
        loss = F.cross_entropy(logits.float(), labels)
        return loss, loss

    return Contender(how, forward, list(model.parameters()), optimiser.step)


def measure(args: argparse.Namespace, name: str, how: str) -> Result:
    """Speed and memory of one; a note where it fails."""
    result = Result(name, how)
    try:
        step = contender(args, name, how)
        warm_up(step, 1)
        step.clear(keep=True)
        result.activation_mb = peak_activation_bytes(step.run, torch.device(args.device)) / 2**20
        time_in_turns([step], args)
    except Exception as failure:  # a compiler's or the device's; the others are measured all the same
        result.note = first_line(failure)
        return result
    times = [t / args.batch_size for t in step.times_ms]
    result.ms_per_image, result.ms_per_image_min, result.ms_per_image_max = (
        statistics.median(times),
        min(times),
        max(times),
    )
    result.images_per_s, result.times_ms = 1e3 / result.ms_per_image, step.times_ms
    return result


def main(argv: list[str] | None = None) -> int:
    """Run, print, write the JSON after each; 2 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ["tiny"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compiled, too")
    args = parser.parse_args(argv)
    check_options(parser, args)
    device = torch.device(args.device)
    facts = hardware(device) | same_arithmetic(device)
    print_head(facts, args, "bfloat16" if device.type == "cuda" else "float32")
    results: list[Result] = []
    for name in args.models:
        for how in ("eager", "compiled")[: 1 + args.compile]:
            results.append(measure(args, name, how))
            write_report(facts, args, results)
            r = results[-1]
            found = r.note if r.ms_per_image is None else f"{r.ms_per_image:.3f} ms/image, {r.images_per_s:.0f} img/s"
            print(
                f"{name} {how}: {found}" + ("" if r.activation_mb is None else f", {r.activation_mb:.0f} MB"),
                flush=True,
            )
            torch.compiler.reset()
    return 2 if any(r.note is not None for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())

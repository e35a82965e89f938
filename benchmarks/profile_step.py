"""Which kernels a training step launches, how long each takes, and how long the device waits for the host.

    python benchmarks/profile_step.py --models tiny --batch-size 128 --json profile.json

Encoder, decoder, loss on the masked patches, backward pass and AdamW, under autocast to bfloat16 on CUDA. The JSON's
rows are the kernels that take longest; beside it lies `NAME.trace.json.gz`, for chrome://tracing or perfetto.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import add_options, check_options, hardware, print_head, same_arithmetic, synchronise, write_report
from torch.profiler import ProfilerActivity, profile

from convnextv2.models.fcmae import create_fcmae

TRACE_BYTES = 6 * 2**20


@dataclass
class Row:
    """A kernel, in one step."""

    model: str
    kernel: str
    calls: float
    us: float
    share: float
    """Of the time of all kernels."""


def step_of(args: argparse.Namespace, name: str) -> Any:
    """A training step, to be called."""
    device = torch.device(args.device)
    model = create_fcmae(name, img_size=args.img_size, mask_ratio=args.mask_ratio, backend=args.backend).to(device)
    images = torch.randn(args.batch_size, 3, *args.img_size, device=device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(images, return_pred=False).loss
        loss.backward()
        optimiser.step()

    return step


def rows_of(events: Any, name: str, steps: int, on: torch.autograd.DeviceType) -> list[Row]:
    """Of a profile of ``steps``; what runs on the processor is counted by its own time."""
    calls: dict[str, int] = defaultdict(int)
    took: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == on and not event.is_user_annotation:
            calls[event.name] += 1
            took[event.name] += event.time_range.elapsed_us() if on.name == "CUDA" else event.self_cpu_time_total
    whole = sum(took.values())
    order = sorted(took, key=lambda kernel: -took[kernel])
    return [Row(name, k, calls[k] / steps, took[k] / steps, took[k] / whole) for k in order]


def main(argv: list[str] | None = None) -> int:
    """Profile each model, print its slowest kernels, write the JSON and the traces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ["tiny"], batch_size=128)
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu", repeats=3, warmup=3)
    parser.add_argument("--backend", default="triton" if torch.cuda.is_available() else "auto")
    args = parser.parse_args(argv)
    check_options(parser, args)
    device = torch.device(args.device)
    facts = hardware(device) | same_arithmetic(device)
    print_head(facts, args, "bfloat16" if device.type == "cuda" else "float32")
    results: list[Row] = []
    for name in args.models:
        step = step_of(args, name)
        for _ in range(args.warmup):
            step()
        synchronise(device)
        start = time.perf_counter()
        for _ in range(args.repeats):
            step()
        synchronise(device)
        wall = (time.perf_counter() - start) / args.repeats * 1e6
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        with profile(activities=activities, acc_events=True) as profiler:
            for _ in range(args.repeats):
                step()
            synchronise(device)
        on = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
        new = rows_of(profiler.events(), name, args.repeats, on)
        busy, launches = sum(row.us for row in new), sum(row.calls for row in new)
        facts[name] = (
            f"{wall / 1e3:.2f} ms a step without the profiler, kernels {busy / 1e3:.2f} ms, {launches:.0f} calls"
        )
        print(f"{name}: {facts[name]}")
        for row in new[:25]:
            print(f"  {row.us:>10.1f} µs {row.share:>6.1%} {row.calls:>7.1f} calls  {row.kernel[:90]}")
        results += new[:60]
        write_report(facts, args, results)
        if args.json is not None:
            write_trace(profiler, args.json.with_name(f"{args.json.stem}.trace.json.gz"))
    return 0


def write_trace(profiler: Any, path: Path) -> None:
    """The profiler's trace, unless it is larger than it is of use."""
    plain = path.with_suffix("")
    profiler.export_chrome_trace(str(plain))
    packed = gzip.compress(plain.read_bytes())
    plain.unlink()
    if len(packed) <= TRACE_BYTES:
        path.write_bytes(packed)
    else:
        print(f"the trace has {len(packed) / 2**20:.1f} MiB and is left out")


if __name__ == "__main__":
    sys.exit(main())

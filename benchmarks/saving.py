"""What saving a state costs a pre-training: the time that it waits, and what the writing takes from the steps after it.

python benchmarks/saving.py FOLDER --models tiny --batch-size 16 --json saving.json
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import add_options, check_options, hardware, print_head, write_report
from epoch import links

from convnextv2.training import PretrainOptions, pretrain
from convnextv2.training.keeping import Keeper

EVERY = 4
"""Updates from one save to the next; the last of them is taken for a quiet one."""


@dataclass
class Result:
    """Seconds, medians: of a step, of what training waits for a save, and of the steps between two saves by place."""

    model: str
    state_mib: float
    step: float
    wait: float
    wait_in_steps: float
    steps_after_a_save: list[float]
    waits: list[float] = field(default_factory=list)


def measure(args: argparse.Namespace, name: str, folder: Path) -> Result:
    """One run that saves every few updates."""
    waits, ends = list[float](), list[float]()
    save = Keeper.save

    def timed(self: Keeper, *given: Any, **named: Any) -> None:
        start = time.perf_counter()
        save(self, *given, **named)
        waits.append(time.perf_counter() - start)

    Keeper.save = timed  # type: ignore[method-assign]
    try:
        pretrain(
            PretrainOptions(
                data=folder / "images",
                output=folder / "run",
                model=name,
                img_size=args.img_size,
                batch_size=args.batch_size,
                epochs=1,
                lr=1e-6,
                device=args.device,
                reconstruct_every=0,
                probe="none",
                tracker="none",
                save_steps=EVERY,
            ),
            log=lambda line: None,
            progress=lambda batches, total, text: batches,
            on_loss=lambda step, loss: ends.append(time.perf_counter()),
        )
    finally:
        Keeper.save = save  # type: ignore[method-assign]
    # From one loss to the next: the update, a save that may follow it, and the next forward and backward pass.
    steps = [after - before for before, after in itertools.pairwise(ends)]
    places = [statistics.median(steps[EVERY - 1 + place :: EVERY]) for place in range(EVERY)]
    state = folder / "run" / "checkpoints" / "state"
    size = sum(path.stat().st_size for path in state.iterdir()) / 2**20
    wait = statistics.median(waits)
    return Result(name, round(size, 1), places[-1], wait, wait / places[-1], places, waits)


def main(argv: list[str] | None = None) -> int:
    """Run, print, write the JSON after each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of photographs")
    add_options(parser, ["tiny"])
    args = parser.parse_args(argv)
    check_options(parser, args)
    facts, results = hardware(torch.device(args.device)), list[Result]()
    print_head(facts, args, "float32")
    for name in args.models:
        with tempfile.TemporaryDirectory() as place:
            links(args.data, (args.repeats + 2) * EVERY * args.batch_size, Path(place) / "images")
            results.append(measure(args, name, Path(place)))
        write_report(facts, args, results)
    for r in results:
        after = ", ".join(f"{seconds:.2f}" for seconds in r.steps_after_a_save)
        waits = f"a save of {r.state_mib:.0f} MiB waits {1000 * r.wait:.0f} ms, {r.wait_in_steps:.2f} of a step"
        print(f"{r.model}: {waits} of {r.step:.2f} s; steps from a save to the next: {after} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

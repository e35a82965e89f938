"""Epochs of pre-training, from files to weights, against the bare step at the same batch, in one run.

A ratio of 1 means that reading, decoding and cropping cost nothing. After every few steps of the run as many are taken
with a batch that is there already, while the processes of its loader are stopped, so that a machine whose pace changes
from minute to minute is compared with itself. A first epoch, which starts the processes, is told apart.

    python benchmarks/epoch.py FOLDER --models atto --batch-size 64 --repeats 3 --json epoch.json
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import add_options, check_options, hardware, print_head, write_report

from convnextv2 import create_fcmae
from convnextv2.training import PretrainOptions, pretrain
from convnextv2.training.optim import create_optimizer, parameter_groups

WAYS: dict[str, dict[str, Any]] = {
    "files": {},
    "files, torchvision": {"resize": "torchvision"},
    "cache": {"cache": True},
    "cache, torchvision": {"cache": True, "resize": "torchvision"},
}


@dataclass
class Result:
    """Of all but the first epoch: the ratio of the paces of neighbouring steps, its mean and standard error, and images
    a second."""

    model: str
    way: str
    images: int
    ratio: float
    ratio_se: float
    ratio_median: float
    first_ratio: float
    data_wait: float
    loaded_images_per_s: list[float] = field(default_factory=list)
    bare_images_per_s: list[float] = field(default_factory=list)


def links(data: Path, count: int, folder: Path) -> None:
    """A folder of links to ``count`` images below ``data``, spread evenly."""
    files = sorted(path for path in data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(files) < count:
        raise SystemExit(f"error: {data}: expected {count} images, found {len(files)}; say --images")
    folder.mkdir()
    for number in range(count):
        file = files[number * len(files) // count]
        (folder / f"{number:06d}{file.suffix}").symlink_to(file.resolve())


def bare_step(args: argparse.Namespace, name: str) -> Callable[[], None]:
    """A step with a batch that is there already."""
    model = create_fcmae(name, img_size=args.img_size).to(args.device)
    optimizer = create_optimizer(parameter_groups(model, 0.05), 1e-6, (0.9, 0.95), "adamw", args.device == "cpu")
    images = torch.randn(args.batch_size, 3, *args.img_size, device=args.device)

    def run() -> None:
        loss = model(images, return_pred=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return run


@contextlib.contextmanager
def stopped(processes: Iterable[Any]) -> Iterator[None]:
    """Meanwhile the processes do nothing."""
    pids = [process.pid for process in processes]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


class Turns:
    """The batches of a run, and after some of them as many bare steps; the seconds that each took, by epoch."""

    def __init__(self, step: Callable[[], None], length: int) -> None:
        self.step, self.length = step, length
        self.epochs: list[list[tuple[float, float]]] = []

    def __call__(self, batches: Iterable[Any], total: int, text: str) -> Iterator[Any]:
        self.epochs.append([])
        start = time.perf_counter()
        for number, batch in enumerate(batches, 1):
            yield batch
            if number % self.length == 0:
                loaded = time.perf_counter() - start
                with stopped(multiprocessing.active_children()):
                    start = time.perf_counter()
                    for _ in range(self.length):
                        self.step()
                    bare = time.perf_counter() - start
                self.epochs[-1].append((loaded, bare))
                start = time.perf_counter()


def measure(args: argparse.Namespace, name: str, way: str, folder: Path) -> Result:
    """One run."""
    given = dict(WAYS[way])
    if "cache" in given:
        given["cache"] = folder / "cache"
    options = PretrainOptions(
        data=folder / "images",
        output=folder / "run",
        model=name,
        img_size=args.img_size,
        batch_size=args.batch_size,
        mask_ratio=args.mask_ratio,
        epochs=1 + args.repeats,
        lr=1e-6,
        device=args.device,
        workers=args.workers,
        reconstruct_every=0,
        probe="none",
        overwrite=True,
        **given,
    )
    step = bare_step(args, name)
    for _ in range(args.warmup):
        step()
    turns = Turns(step, args.turn)
    rows = pretrain(options, log=lambda line: None, progress=turns).metrics[1:]
    first, *others = turns.epochs
    pairs = [pair for epoch in others for pair in epoch]
    ratios = [bare / loaded for loaded, bare in pairs]
    waited = sum(row["data_wait"] * row["seconds"] for row in rows)
    images = args.turn * args.batch_size
    return Result(
        model=name,
        way=way,
        images=args.images,
        ratio=statistics.mean(ratios),
        ratio_se=statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0,
        ratio_median=statistics.median(ratios),
        first_ratio=statistics.mean(bare / loaded for loaded, bare in first),
        data_wait=waited / sum(loaded for loaded, _ in pairs),
        loaded_images_per_s=[round(images / loaded, 2) for loaded, _ in pairs],
        bare_images_per_s=[round(images / bare, 2) for _, bare in pairs],
    )


def main(argv: list[str] | None = None) -> int:
    """Run, print, write the JSON after each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of photographs")
    add_options(parser, ["atto"], batch_size=64)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--images", type=int, default=1280, help="of an epoch; --repeats epochs are timed")
    parser.add_argument("--turn", type=int, default=5, help="steps of either kind in turn")
    parser.add_argument("--workers", type=int, default=2, help="as of pretrain.py")
    args = parser.parse_args(argv)
    check_options(parser, args)
    args.images -= args.images % (args.batch_size * args.turn)
    if not args.images:
        parser.error("--images must be at least --batch-size times --turn")
    facts, results = hardware(torch.device(args.device)), list[Result]()
    print_head(facts, args, "float32")
    for name in args.models:
        with tempfile.TemporaryDirectory() as place:
            links(args.data, args.images, Path(place) / "images")
            for way in args.ways:
                results.append(measure(args, name, way, Path(place)))
                write_report(facts, args, results)
    for r in results:
        pace = (
            f"{statistics.median(r.loaded_images_per_s):.1f} of {statistics.median(r.bare_images_per_s):.1f} images/s"
        )
        told = f"median {r.ratio_median:.3f}, the first epoch {r.first_ratio:.3f}, {pace}"
        print(
            f"{r.model} {r.way}: {r.ratio:.3f} ± {r.ratio_se:.3f}, {told}, {100 * r.data_wait:.1f} % waiting for data"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Epochs of pre-training, from files to weights, against the bare step at the same batch, in turns.

A ratio of 1 means that reading, decoding and cropping cost nothing. The step takes a batch that is there already.
A run's first epoch starts workers and touches memory for the first time, as the steps did before they are timed, so
the second is taken; the ratio of the first is told beside.

    python benchmarks/epoch.py FOLDER --models atto --batch-size 64 --repeats 3 --json epoch.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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
    """Images a second of second epochs and of the step between them, and the median of their ratios."""

    model: str
    way: str
    images: int
    ratio: float
    ratio_min: float
    ratio_max: float
    first_ratio: float
    data_wait: float
    epoch_images_per_s: list[float] = field(default_factory=list)
    first_epoch_images_per_s: list[float] = field(default_factory=list)
    step_images_per_s: list[float] = field(default_factory=list)


def links(data: Path, count: int, folder: Path) -> None:
    """A folder of links to ``count`` images below ``data``, spread evenly."""
    files = sorted(path for path in data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(files) < count:
        raise SystemExit(f"error: {data}: expected {count} images, found {len(files)}; say --images")
    folder.mkdir()
    for number in range(count):
        file = files[number * len(files) // count]
        (folder / f"{number:06d}{file.suffix}").symlink_to(file.resolve())


def bare_step(args: argparse.Namespace, name: str) -> Callable[[], float]:
    """Takes as many steps as an epoch has; images a second."""
    model = create_fcmae(name, img_size=args.img_size).to(args.device)
    optimizer = create_optimizer(parameter_groups(model, 0.05), 1e-6, (0.9, 0.95), "adamw", args.device == "cpu")
    images = torch.randn(args.batch_size, 3, *args.img_size, device=args.device)

    def run() -> float:
        steps = args.images // args.batch_size
        start = time.perf_counter()
        for _ in range(steps):
            loss = model(images, return_pred=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()
        return steps * args.batch_size / (time.perf_counter() - start)

    return run


def epoch(args: argparse.Namespace, name: str, way: str, folder: Path) -> tuple[float, float, float]:
    """Images a second of the first and the second epoch of a run, and the share of the latter that waited for data."""
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
        epochs=2,
        lr=1e-6,
        device=args.device,
        workers=args.workers,
        reconstruct_every=0,
        probe="none",
        overwrite=True,
        **given,
    )
    first, row = pretrain(options, log=lambda line: None, progress=lambda batches, total, text: batches).metrics
    return first["images_per_s"], row["images_per_s"], row["data_wait"]


def measure(args: argparse.Namespace, name: str, folder: Path) -> list[Result]:
    """All ways of a model, in turns with the step."""
    step, waits = bare_step(args, name), {way: list[float]() for way in args.ways}
    results = {way: Result(name, way, args.images, 0, 0, 0, 0, 0) for way in args.ways}
    for way in args.ways:
        epoch(args, name, way, folder)
    step()
    for _ in range(args.repeats):
        for way, result in results.items():
            before = step()
            first, pace, wait = epoch(args, name, way, folder)
            result.first_epoch_images_per_s.append(first)
            result.epoch_images_per_s.append(pace)
            result.step_images_per_s.append((before + step()) / 2)
            waits[way].append(wait)
    for way, result in results.items():
        ratios, firsts = (
            [pace / step for pace, step in zip(paces, result.step_images_per_s, strict=True)]
            for paces in (result.epoch_images_per_s, result.first_epoch_images_per_s)
        )
        result.first_ratio = statistics.median(firsts)
        result.ratio, result.ratio_min, result.ratio_max = statistics.median(ratios), min(ratios), max(ratios)
        result.data_wait = statistics.median(waits[way])
    return list(results.values())


def main(argv: list[str] | None = None) -> int:
    """Run, print, write the JSON after each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of photographs")
    add_options(parser, ["atto"], batch_size=64)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--images", type=int, default=640, help="of an epoch")
    parser.add_argument("--workers", type=int, default=2, help="as of pretrain.py")
    args = parser.parse_args(argv)
    check_options(parser, args)
    args.images -= args.images % args.batch_size
    if not args.images:
        parser.error("--images must be at least --batch-size")
    facts, results = hardware(torch.device(args.device)), list[Result]()
    print_head(facts, args, "float32")
    for name in args.models:
        with tempfile.TemporaryDirectory() as place:
            links(args.data, args.images, Path(place) / "images")
            results += measure(args, name, Path(place))
        write_report(facts, args, results)
    for r in results:
        spread = f"{r.ratio_min:.3f}-{r.ratio_max:.3f}"
        pace = f"{statistics.median(r.epoch_images_per_s):.1f} of {statistics.median(r.step_images_per_s):.1f} images/s"
        wait = f"{100 * r.data_wait:.1f} % waiting for data"
        print(f"{r.model} {r.way}: {r.ratio:.3f} ({spread}), the first epoch {r.first_ratio:.3f}, {pace}, {wait}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

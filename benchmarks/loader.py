"""What a training sample costs the processor that loads it, by way of loading.

One process loads everything, so its processor time is that of the loader: decoding or cache, crop, resize, flip, the
batch. What is then left for the device (normalising, and resizing where that is done there) has a column of its own:
its time on this processor. Ways are measured in turns. Without a folder, JPEG of 256×192 pixels are made, of noise of
several scales.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import hardware, print_facts, write_report
from PIL import Image
from torch.utils.data import default_collate

from convnextv2.data import DataError, build_pretrain_dataset
from convnextv2.data.batches import Samples
from convnextv2.data.cache import cached
from convnextv2.training.feeding import needed_side

SCALE = 0.2
"""Smallest share of an image that a crop of pre-training takes."""


@dataclass(frozen=True)
class Result:
    """Milliseconds a sample; ``samples_per_s`` are of one core, by processor time."""

    way: str
    processor_ms: float
    least_ms: float
    most_ms: float
    samples_per_s: float
    finish_ms: float


@dataclass(frozen=True)
class Way:
    """``load`` makes a batch of numbers of images, ``finish`` what the network is given."""

    name: str
    load: Any
    finish: Any
    views: int = 1


def made_images(folder: Path, count: int) -> Path:
    """JPEG files of 256×192 pixels, quality 85."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = np.zeros((192, 256, 3))
        for side in (4, 16, 64):
            noise = rng.integers(0, 86, (side, side, 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(noise).resize((256, 192), Image.Resampling.BICUBIC))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:04d}.jpg", quality=85)
    return folder


def make_ways(data: Path, cache: Path, size: tuple[int, int], views: int) -> tuple[int, list[Way]]:
    """How many images there are, and the ways to load them."""
    build = partial(build_pretrain_dataset, data, size)
    plain, kept = build(), build()
    kept.source = cached(kept.source, cache, needed_side(size, SCALE))

    def way(name: str, samples: Samples) -> Way:
        return Way(
            name,
            lambda numbers: samples.collate([samples[number] for number in numbers]),
            samples.finish,
            samples.views,
        )

    return len(plain), [
        Way(
            "floats from the loader", lambda numbers: default_collate([plain[n] for n in numbers]), lambda batch: batch
        ),
        way("bytes", Samples(plain)),
        way("bytes, torchvision", Samples(plain, resizer="torchvision")),
        way("cache", Samples(kept)),
        way("cache, torchvision", Samples(kept, resizer="torchvision")),
        way("device crops", Samples(plain, on_device=True)),
        way("cache, device crops", Samples(kept, on_device=True)),
        way(f"bytes, {views} views", Samples(plain, views=views)),
        way(f"cache, {views} views, torchvision", Samples(kept, views=views, resizer="torchvision")),
    ]


def measure(args: argparse.Namespace, count: int, ways: list[Way]) -> list[Result]:
    """Processor time of each way, in turns; the first round fills caches and does not count."""
    chosen = np.linspace(0, count - 1, min(count, args.samples)).astype(int).tolist()
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    finishing: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(args.repeats + 1):
        for way in ways:
            loading = finish = 0.0
            seen = 0
            step = max(1, args.batch_size // way.views)
            for first in range(0, len(chosen), step):
                start = time.process_time()
                batch = way.load(chosen[first : first + step])
                between = time.process_time()
                seen += len(way.finish(batch))
                loading, finish = loading + between - start, finish + time.process_time() - between
            times[way.name].append(1e3 * loading / seen)
            finishing[way.name].append(1e3 * finish / seen)
    results = []
    for way in ways:
        found = times[way.name][1:]
        middle = statistics.median(found)
        rest = statistics.median(finishing[way.name][1:])
        results.append(Result(way.name, middle, min(found), max(found), 1e3 / middle, rest))
    return results


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="folder of images; made ones if left out")
    parser.add_argument(
        "--img-size", type=int, nargs="+", default=[224], help="pixels: one number, or height and width"
    )
    parser.add_argument("--samples", type=int, default=512, help="images of a round, spread over the folder")
    parser.add_argument("--batch-size", type=int, default=64, help="crops a batch")
    parser.add_argument("--views", type=int, default=4, help="crops of each decoded image, where there are several")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--json", type=Path, help="write hardware, versions and results to this file")
    args = parser.parse_args()
    if min(*args.img_size, args.samples, args.batch_size, args.views, args.repeats) < 1:
        parser.error("all numbers must be at least 1")
    args.img_size = tuple(args.img_size * 2 if len(args.img_size) == 1 else args.img_size)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made, cache = Path(folder) / "made", Path(folder) / "cache"
        if args.data is None:
            made.mkdir()
            made_images(made, args.samples)
        try:
            count, ways = make_ways(args.data or made, cache, args.img_size, args.views)
        except DataError as error:
            parser.error(str(error))
        results = measure(args, count, ways)
    facts = hardware(torch.device("cpu"))
    print_facts(facts)
    print(f"{count} images, {args.img_size[0]}×{args.img_size[1]}, batch {args.batch_size}, {args.repeats} rounds")
    print(f"{'way':36s} {'processor, ms a sample':>26s} {'samples/s, core':>16s} {'left to the device, ms':>23s}")
    for r in results:
        spread = f"{r.processor_ms:.3f} ({r.least_ms:.3f}–{r.most_ms:.3f})"
        print(f"{r.way:36s} {spread:>26s} {r.samples_per_s:16.0f} {r.finish_ms:23.3f}")
    write_report(facts, args, results)


if __name__ == "__main__":
    main()

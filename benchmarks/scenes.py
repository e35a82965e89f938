"""Windows of scenes that are far larger than memory should hold: how many a core reads in a second, and in what memory.

Scenes are written tile by tile, one after the other, some GB each, where ``TMPDIR`` says. A process that is forked for
each, as a loader's are, makes samples of pre-training: a random window, cropped at native scale. Its processor time
counts. Memory is the peak of its resident set (VmHWM), of which what it was forked with, torch above all, is told
apart: those pages are shared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from common import hardware, print_facts, write_report

from convnextv2.data import build_pretrain_dataset
from convnextv2.data.batches import Samples
from convnextv2.data.decoding import Wanted

SCENES = {
    f"{bits}-bit, {bands} bands, {compression or 'as they are'}, tiles of {tile}": (bits, bands, compression, tile)
    for bits, bands in ((8, 3), (16, 4))
    for compression in (None, "deflate", "zstd")
    for tile in ((256, 512) if compression == "deflate" else (256,))
}
LEVELS = 2**8, 2**12
"""Values of scenes of 8 and of 16 bits, those of most cameras."""


@dataclass(frozen=True)
class Result:
    """Windows a second of processor time in rounds: median, least and most; memory in MiB."""

    scene: str
    file_mib: float
    windows: int
    windows_per_s: float
    least: float
    most: float
    peak_mib: float
    at_start_mib: float
    own_mib: float


def tiles(side: int, tile: int, bits: int, bands: int) -> Iterator[np.ndarray]:
    """Noise on waves, one tile after the other."""
    high, kind = LEVELS[bits > 8], np.dtype(f"u{bits // 8}")
    noise = np.random.default_rng(0).normal(0, high / 60, (tile, tile, bands))
    places = np.arange(tile)
    for top in range(0, side, tile):
        for left in range(0, side, tile):
            wave = np.sin((places + top) / 37)[:, None] * np.cos((places + left) / 53) * high / 3 + high / 2
            yield (wave[..., None] + noise).clip(0, high - 1).astype(kind)


def write(path: Path, side: int, bits: int, bands: int, compression: str | None, tile: int) -> None:
    """A scene of ``side`` × ``side`` pixels."""
    how: dict[str, Any] = {"shape": (side, side, bands), "dtype": f"u{bits // 8}", "tile": (tile, tile)}
    how |= {"photometric": "minisblack", "planarconfig": "contig", "compression": compression}
    tifffile.imwrite(path, tiles(side, tile, bits, bands), **how, bigtiff=True)


def mebibytes(name: str) -> float:
    """Of this process, as the system says."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


def rounds(samples: Samples, count: int, repeats: int, sent: Any) -> None:
    """Processor seconds of rounds, the first of which does not count, and memory."""
    start, found = mebibytes("VmRSS"), []
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    for number in range(repeats + 1):
        samples.images.set_epoch(number)
        before = time.process_time()
        for index in range(count):
            samples[order[(number * count + index) % len(order)]]
        found.append(time.process_time() - before)
    sent.send((found[1:], mebibytes("VmHWM"), start))


def measure(path: Path, name: str, bands: int, args: argparse.Namespace) -> Result:
    """One scene, in a process of its own."""
    size = args.window, args.window
    wanted = Wanted(pixels="native", window=size, crop="native")
    images = build_pretrain_dataset(path, size, bands, wanted=wanted, mean=[0.0] * bands, std=[1.0] * bands)
    receiving, sending = multiprocessing.Pipe(duplex=False)
    how = (Samples(images), args.windows, args.repeats, sending)
    process = multiprocessing.get_context("fork").Process(target=rounds, args=how)
    process.start()
    seconds, peak, start = receiving.recv()
    process.join()
    rates = sorted(args.windows / one for one in seconds)
    about = path.stat().st_size / 2**20, len(images), statistics.median(rates), rates[0], rates[-1]
    return Result(name, *about, peak, start, peak - start)


def main() -> None:
    """Parse, write, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--side", type=int, default=20_000, help="pixels of a scene's sides")
    parser.add_argument("--window", type=int, default=224, help="pixels of a window's sides")
    parser.add_argument("--windows", type=int, default=100, help="windows of a round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--scenes", nargs="+", type=int, help=f"which of the {len(SCENES)}, from 1; default: all")
    parser.add_argument("--json", type=Path, help="write hardware, versions and results to this file")
    args = parser.parse_args()
    if min(args.side, args.window, args.windows, args.repeats) < 1:
        parser.error("all numbers must be at least 1")
    torch.set_num_threads(1)
    facts = {**hardware(torch.device("cpu")), "tifffile": tifffile.__version__}
    print_facts(facts)
    print(f"{args.side}×{args.side} pixels, windows of {args.window}×{args.window}, {args.repeats} rounds")
    print(f"{'scene':44s} {'MiB':>6s} {'windows/s, core':>22s} {'peak MiB':>9s} {'of it its own':>13s}")
    results: list[Result] = []
    for number, (name, (bits, bands, compression, tile)) in enumerate(SCENES.items(), 1):
        if args.scenes is not None and number not in args.scenes:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scene.tif"
            write(path, args.side, bits, bands, compression, tile)
            r = measure(path, name, bands, args)
        results.append(r)
        spread = f"{r.windows_per_s:.0f} ({r.least:.0f}–{r.most:.0f})"
        print(f"{r.scene:44s} {r.file_mib:6.0f} {spread:>22s} {r.peak_mib:9.0f} {r.own_mib:13.0f}", flush=True)
        write_report(facts, args, results)


if __name__ == "__main__":
    main()

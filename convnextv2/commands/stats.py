"""Measure the values of a set of images: mean, std, percentiles, histogram and no-data share of each band.

Images are read one after the other, in several processes, so memory does not grow with the set. What is found is kept
with the images, in DATA/.statistics.json, where pre-training and fine-tuning of native images take mean and standard
deviation from as long as the files are the same, and drawn as a picture.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from convnextv2.commands import _cli
from convnextv2.data.decoding import PIXELS, Wanted
from convnextv2.data.listings import walk_files
from convnextv2.data.names import name_of
from convnextv2.data.scenes import is_scene, scene_bands
from convnextv2.data.sources import DataError
from convnextv2.data.statistics import FILE, FORMAT, BandStatistics, measure, place_of, save_statistics
from convnextv2.outputs import Kind, check_output, is_stream
from convnextv2.training.pixel_options import parse_bands

MOST_DRAWN = 24
"""Bands that have a histogram in the picture."""
START = f'{{\n  "format": {FORMAT},\n  "reading": '.encode()
STATISTICS = Kind("statistics", (".json",), lambda path: _cli.starts_with(path, START))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, keep, draw."""
    options = parse(arguments)

    from convnextv2.data.opening import open_source
    from convnextv2.data.reading import files_of, wanted_of
    from convnextv2.training.pictures import PICTURE

    check_output(options.output, PICTURE, inputs=[options.data], overwrite=options.overwrite)
    if options.json is not None:
        check_output(options.json, STATISTICS, inputs=[options.data], overwrite=options.overwrite)
    bands = None if options.bands is None else parse_bands(options.bands)
    wanted = Wanted(
        options.max_pixels, pixels=options.pixels, bands=bands, no_data=options.no_data, window=options.window
    )
    channels = options.in_chans or (len(bands) if bands else bands_of(options.data))
    opened = open_source(options.data, in_chans=channels, wanted=wanted)
    _cli.say_skipped(opened.train.skipped)
    images, wanted = opened.train.by_number, wanted_of(opened.train.images)
    if wanted.pixels == "auto":
        raise DataError(f"{options.data}: holds no image files, whose values could be measured")
    numbers = list(range(len(images)))
    if options.sample is not None and options.sample < len(numbers):
        numbers = np.unique(np.linspace(0, len(images) - 1, options.sample).round().astype(int)).tolist()
    progress = partial(_cli.progress, description="parts")
    found = measure(images, numbers, channels, processes=options.processes, progress=progress)
    files = files_of(images)
    _cli.say_skipped([(Path(name_of(images, number)), reason) for number, reason in found.unreadable])
    if not any(band.count for band in found.bands):
        raise DataError(f"{options.data}: none of {len(numbers)} images has data in any band")
    place = options.json or place_of(options.data)
    save_statistics(place, found, wanted, files)
    draw(options.output, found)
    report = _cli.warn if is_stream(options.output) else _cli.say
    for line in table(found):
        report(line)
    kind = (
        "in the units of the files" if wanted.native else "photographs, 8 bits: training takes its usual mean and std"
    )
    what = "images" if options.window is None else "windows"
    report(f"{found.images} of {len(images)} {what}, {kind}: {place}, {options.output}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options, as far as they can be checked by themselves."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "data", type=Path, metavar="DATA", help="folder of images, or a scene; of train/ and val/ only train/"
    )
    _cli.add_output(parser, "statistics.png", "PNG file to draw histograms in, - for standard output")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"where to keep what is found; default: DATA/{FILE}, of one file beside it",
    )
    parser.add_argument("--in-chans", type=_cli.positive_int, help="channels; default: those of the first image")
    parser.add_argument("--bands", help="bands to take, numbered from 1, as in 4,3,2; default: all")
    parser.add_argument("--no-data", type=float, help="value that is no data, beside NaN and what files declare")
    parser.add_argument("--pixels", choices=PIXELS, default="auto", help="as of fcmae pretrain")
    parser.add_argument("--sample", type=_cli.positive_int, help="images to look at, spread evenly; default: all")
    usual = min(8, os.cpu_count() or 1)
    parser.add_argument("--processes", type=_cli.positive_int, default=usual, help="that read images")
    _cli.add_max_pixels(parser)
    _cli.add_window(parser)
    return parser.parse_args(arguments)


def bands_of(data: Path) -> int:
    """Bands of the first image in a folder."""
    for path in [data] if is_scene(data) else [path for path, _ in walk_files(data, [])]:
        if (count := scene_bands(path)) is not None:
            return count
    raise DataError(f"{data}: looked for images at all depths and found none whose bands could be counted")


def table(found: BandStatistics) -> list[str]:
    """A heading, and a line for each band."""
    names = "band", "mean", "std", "least", "1 %", "50 %", "99 %", "greatest", "no data"
    rows = [list(names)]
    for number, (band, mean, std) in enumerate(zip(found.bands, *found.mean_std, strict=True), 1):
        known = [mean, std, band.low, *(band.percentile(share) for share in (1, 50, 99)), band.high]
        values = [f"{value:.6g}" for value in known] if band.count else ["-"] * len(known)
        rows.append([str(number), *values, f"{100 * band.no_data_share:.2f} %"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(names))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def draw(path: Path, found: BandStatistics) -> None:
    """A histogram of each of the first bands, with its mean and a standard deviation to both sides."""
    from convnextv2.training.pictures import picture

    shown = list(zip(found.bands[:MOST_DRAWN], *found.mean_std, strict=False))
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    with picture(path, 3.2 * columns + 0.6, 2.4 * rows + 0.5, "constrained") as figure:
        grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        for number, (axes, (band, mean, std)) in enumerate(zip(grid, shown, strict=False), 1):
            counts, edges = band.histogram()
            axes.set_title(f"band {number}, {100 * band.no_data_share:.1f} % no data", size=9)
            if not counts:
                continue
            axes.stairs(counts, edges, fill=True)
            axes.axvspan(mean - std, mean + std, color="C1", alpha=0.2)
            axes.axvline(mean, color="C1")
            axes.set_yscale("log")
        for axes in grid[len(shown) :]:
            axes.set_visible(False)

"""Look through a set of images before it is trained on: a table of what is wrong, a CSV file, a picture.

Told are files that cannot be read, files that are the same, pictures that are nearly the same (scaled, recompressed,
brighter), above all between train and val, blank pictures, odd sizes, and bands or bits other than most images have.
Nothing is changed. Examples:
  fcmae check photos
  fcmae check photos --output check.csv --picture check.png --strict
"""

from __future__ import annotations

import argparse
import csv
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from convnextv2.commands import _cli
from convnextv2.data.checking import Finding, Look, findings, look, pairs_to_show
from convnextv2.data.decoding import UnreadableImageError, Wanted
from convnextv2.data.images import has_image_suffix, load_image
from convnextv2.data.listings import walk_files
from convnextv2.data.names import shown
from convnextv2.data.scenes import is_scene
from convnextv2.data.sources import DataError
from convnextv2.messages import one_line
from convnextv2.outputs import Kind, check_output, is_stream, output_text

HEADER = "kind,what,files"
TABLE = Kind("a table of findings", (".csv",), lambda path: _cli.starts_with(path, HEADER.encode()))
SHOWN = 5
PAIRS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, look, tell."""
    options = parse(arguments)

    from convnextv2.training.pictures import PICTURE

    check_output(options.output, TABLE, inputs=[options.data], overwrite=options.overwrite)
    if options.picture is not None:
        check_output(options.picture, PICTURE, inputs=[options.data], overwrite=options.overwrite)
    skipped = list[tuple[Path, str]]()
    files, parts = listed(options.data, skipped)
    _cli.say_skipped(skipped)
    looks = seen(files, Wanted(options.max_pixels, window=options.window), options.processes)
    found = list(findings(looks, parts, options.least_side))
    with output_text(options.output) as file:
        file.write(f"{HEADER}\n")
        for one in found:
            csv.writer(file, lineterminator="\n").writerow([one.kind, one.what, *(shown(str(f)) for f in one.files)])
    say = _cli.warn if is_stream(options.output) else _cli.say
    for line in summary(looks, found):
        say(line)
    if options.picture is not None:
        chosen = pairs_to_show(found, PAIRS)
        if chosen:
            draw(options.picture, chosen, options.max_pixels)
        say(f"picture of {len(chosen)} pair(s): {options.picture}" if chosen else "no pair of images to draw")
    say(f"{len(found)} finding(s) in {len(files)} files: {options.output}")
    if options.strict and found:
        raise DataError(f"{options.data}: {len(found)} finding(s), listed in {options.output}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options, as far as they can be checked by themselves."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of images, whose train/ and val/ are compared")
    _cli.add_output(parser, "check.csv", "CSV file to write, - for standard output")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="PNG file to draw pairs that are alike in")
    parser.add_argument(
        "--least-side", type=_cli.positive_int, default=32, help="pixels of a side that is not odd (32)"
    )
    parser.add_argument("--strict", action="store_true", help="end with status 2 if anything is found")
    usual = min(8, os.cpu_count() or 1)
    parser.add_argument("--processes", type=_cli.positive_int, default=usual, help=f"that read images ({usual})")
    _cli.add_max_pixels(parser)
    _cli.add_window(parser)
    return parser.parse_args(arguments)


def listed(data: Path, skipped: list[tuple[Path, str]]) -> tuple[list[Path], list[str]]:
    """The files that are called like images, or like nothing known but are none, and the part that each belongs to."""
    parted = all((data / part).is_dir() for part in ("train", "val"))
    files, parts = list[Path](), list[str]()
    for path in [data] if is_scene(data) else [path for path, _ in walk_files(data, skipped)]:
        if not (has_image_suffix(path) or is_scene(path)):
            skipped.append((path, "is not called like an image"))
            continue
        inside = path.relative_to(data).parts if path != data else ()
        files.append(path)
        parts.append(inside[0] if parted and len(inside) > 1 else "the folder")
    if not files:
        raise DataError(f"{data}: looked for images at all depths and found none")
    return files, parts


def seen(files: Sequence[Path], wanted: Wanted, processes: int) -> list[Look]:
    """What each of the files was seen to be, in their order."""
    from convnextv2.data.loading import process_pool

    shown_progress = partial(_cli.progress, total=len(files), description="images")
    looking = partial(look, wanted=wanted)
    if processes <= 1 or len(files) < 64:
        return list(shown_progress(map(looking, files)))
    with process_pool(processes) as pool:
        return list(shown_progress(pool.map(looking, files, chunksize=16)))


def summary(looks: Sequence[Look], found: Sequence[Finding]) -> list[str]:
    """Lines: sizes and bands of what was read, and each kind of finding with its first few."""
    good = [one for one in looks if not one.reason]
    lines = [f"{len(good)} of {len(looks)} files are images that can be read"]
    if good:
        heights, widths = np.array([one.size for one in good]).T
        sides = (f"{name} {values.min()} to {values.max()}, median {np.median(values):.0f}"
                 for name, values in (("height", heights), ("width", widths)))  # fmt: skip
        bands = Counter(f"{one.bands} band(s) of {'more than 8' if one.deep else '8'} bits" for one in good)
        lines.append("; ".join([*sides, *(f"{count} of {name}" for name, count in bands.most_common(4))]))
    for kind, count in Counter(one.kind for one in found).items():
        lines.append(f"{kind}: {count}")
        chosen = sorted((one for one in found if one.kind == kind), key=lambda one: " and " not in one.what)
        for one in chosen[:SHOWN]:
            names = ", ".join(one_line(shown(str(file))) for file in one.files[:3])
            rest = f" and {len(one.files) - 3} more" if len(one.files) > 3 else ""
            lines.append(f"  {names}{rest}: {one.what}" if names else f"  {one.what}")
        if count > SHOWN:
            lines.append(f"  … and {count - SHOWN} more")
    return lines


def draw(place: Path, pairs: Sequence[tuple[Finding, Path, Path]], max_pixels: int) -> None:
    """Pairs of pictures beside each other, a row each."""
    from convnextv2.training.pictures import picture

    with picture(place, 7, 0.4 + 2.6 * len(pairs), "constrained") as figure:
        axes = figure.subplots(len(pairs), 2, squeeze=False)
        for row, (finding, *files) in zip(axes, pairs, strict=True):
            for axis, path in zip(row, files, strict=True):
                axis.set_axis_off()
                axis.set_title(one_line(shown("/".join(path.parts[-3:])))[-44:], fontsize=7, parse_math=False)
                try:
                    axis.imshow(np.asarray(load_image(path, 3, Wanted(max_pixels, least_side=256))))
                except UnreadableImageError as error:  # of other bands, which no colours stand for
                    axis.text(0.5, 0.5, one_line(error)[:60], ha="center", fontsize=6, wrap=True)
            row[0].text(0, -0.05, finding.what, fontsize=7, transform=row[0].transAxes, parse_math=False)

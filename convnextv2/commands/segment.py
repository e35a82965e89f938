"""Train networks that give every pixel a class, let them predict, and say how right they are.

  fcmae segment train --data cells --init runs/pretrain --output runs/segment
  fcmae segment predict runs/segment photos --output segmented
  fcmae segment evaluate runs/segment cells --output results.json

DATA holds images/ and masks/ with files of the same names, or train/ and val/ that do. Masks are gray or have a
palette; their values are classes, which DATA/classes.json may name. Needs segmentation-models-pytorch
(pip install 'sparse-fcmae[segment]'). Options of each: fcmae segment train --help, and so on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnextv2.commands import _cli
from convnextv2.data import DataError
from convnextv2.evaluation.choices import PRECISIONS
from convnextv2.files import finite
from convnextv2.outputs import Kind, check_output, is_stream, output_path, output_text
from convnextv2.segmentation import SegmentOptions
from convnextv2.segmentation.config import CENTRE_OVERLAP
from convnextv2.segmentation.masks import CLASSES_FILE, Classes, read_classes
from convnextv2.training.recipe import parse_options

if TYPE_CHECKING:
    from convnextv2.segmentation import LoadedSegmenter
    from convnextv2.segmentation.pairs import PairSource
    from convnextv2.segmentation.predicting import Running

RESULT = Kind("an evaluation", (".json",), lambda path: _cli.starts_with(path, b'{\n  "evaluation": '))


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose what to do."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(COMMANDS), help="what to do")
    return COMMANDS[parser.parse_args(given[:1]).what](given[1:])


def program(name: str) -> str:
    """What a usage line calls one of the commands."""
    return f"{Path(sys.argv[0]).name} {name}"


def train(arguments: Sequence[str]) -> int:
    """Parse, train, report."""
    options = parse_options(SegmentOptions, arguments, "Train a network for segmentation.", program("train"))

    from convnextv2.segmentation import segment

    return _cli.train(segment, options, lambda result: _cli.best_line(f"mIoU {result.best_miou:.2f}", result))


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """The options of prediction and evaluation alike."""
    kind = argparse.ArgumentDefaultsHelpFormatter
    parser = _cli.Parser(prog=program(name), description=description, formatter_class=kind)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="of fcmae segment train, or its run folder")
    parser.add_argument("--window", type=_cli.image_size, help="pixels, 512 or 384x512; default: the crops of training")
    text = "share of a window's side that lies in the next one too; more is slower and smoother"
    parser.add_argument("--overlap", type=float, default=CENTRE_OVERLAP, metavar="SHARE", help=text)
    parser.add_argument("--batch-size", type=_cli.positive_int, default=8, help="windows at a time")
    parser.add_argument("--device", type=_cli.device, default="auto", help="cpu, cuda, cuda:1, or auto")
    _cli.add_workers(parser)
    text = "auto (bf16 on a GPU that has it, else no), no, bf16, fp16"
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help=text)
    parser.add_argument("--overwrite", action="store_true", help="let the output replace what is there")
    _cli.add_max_pixels(parser)
    return parser


def load(options: argparse.Namespace, description: str) -> tuple[LoadedSegmenter, Running]:
    """The network, and how it is run."""
    from convnextv2.segmentation import load_segmenter
    from convnextv2.segmentation.predicting import Running
    from convnextv2.segmentation.windows import Windows

    segmenter = load_segmenter(options.checkpoint, device=options.device, window=options.window)
    windows = Windows(segmenter.window, options.overlap)
    progress: Any = partial(_cli.progress, description=description)
    return segmenter, Running(windows, options.batch_size, options.workers, options.precision, progress)


def predict(arguments: Sequence[str]) -> int:
    """Parse, load, predict, report."""
    parser = parser_of("predict", "Write the classes of images as masks, and overlays of them.")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="image files, and folders of images")
    text = "folder for masks/ and overlays/, new or empty"
    parser.add_argument("--output", type=Path, default=Path("segmented"), help=text)
    parser.add_argument("--no-overlays", action="store_true", help="write masks alone")
    parser.add_argument("--opacity", type=_cli.share, default=0.5, help="of the classes' colours in overlays")
    options = parser.parse_args(arguments)

    from convnextv2.segmentation.predicting import check_folder, find_inputs, predict_files

    check_folder(options.output, options.inputs, options.overwrite)
    segmenter, running = load(options, "predict")
    wanted = segmenter.wanted(options.max_pixels)
    images, skipped = find_inputs(options.inputs, segmenter.in_chans, wanted)
    _cli.say_skipped(skipped)
    how: dict[str, Any] = {"overlays": not options.no_overlays, "opacity": options.opacity, "wanted": wanted}
    done = list(predict_files(segmenter, images, options.output, running, **how))
    unreadable = [(one.image, one.error) for one in done if one.error]
    _cli.say_skipped(unreadable)
    _cli.say(f"{len(done) - len(unreadable)} images segmented, {len(unreadable)} unreadable: {options.output}")
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Parse, load, evaluate, report."""
    parser = parser_of("evaluate", "Mean and every class's intersection over union, on whole images with masks.")
    parser.add_argument("data", type=Path, metavar="DATA", help="as of train; of train/ and val/ the latter is taken")
    parser.add_argument("--output", type=output_path, help="JSON file to write, - for standard output; default: none")
    parser.add_argument("--confusion", type=output_path, help="PNG file to draw the confusion matrix in; default: none")
    parser.add_argument("--all", action="store_true", help="all pairs, where DATA has no train/ and val/ folders")
    parser.add_argument("--seed", type=_cli.seed, default=0, help="of train: the same pairs are taken")
    text = "of train: share of the pairs to evaluate on, where DATA has no train/ and val/ folders"
    parser.add_argument("--val-fraction", type=float, default=0.2, metavar="SHARE", help=text)
    options = parser.parse_args(arguments)

    from convnextv2.segmentation.predicting import evaluate_pairs
    from convnextv2.training.pictures import PICTURE, save_confusion_matrix

    if not 0 < options.val_fraction < 1:
        parser.error(f"argument --val-fraction: must be between 0 and 1, got {options.val_fraction}")
    places = [path for path in (options.output, options.confusion) if path is not None]
    if len({path.resolve() for path in places}) < len(places):
        parser.error("--output and --confusion need places of their own")
    for path in places:
        kind = RESULT if path == options.output else PICTURE
        check_output(path, kind, inputs=[options.checkpoint, options.data], overwrite=options.overwrite)
    segmenter, running = load(options, "evaluate")
    scores, unreadable = evaluate_pairs(segmenter, pairs_of(segmenter, options), running)
    _cli.say_skipped(unreadable)
    if options.confusion is not None:
        save_confusion_matrix(options.confusion, scores.confusion, scores.classes)
    if options.output is not None:
        given: dict[str, Any] = {
            "evaluation": "segment",
            "checkpoint": str(options.checkpoint),
            "data": str(options.data),
        }
        given |= {"window": list(segmenter.window), "overlap": options.overlap}
        with output_text(options.output) as file:
            file.write(json.dumps(finite({**given, **scores.as_dict()}), indent=2) + "\n")
    report = _cli.warn if any(map(is_stream, places)) else _cli.say
    rows = [("class", "IoU", "pixels")]
    shares = zip(scores.classes, scores.iou, scores.confusion.sum(1).tolist(), strict=True)
    rows += [
        (_cli.one_line(name), "–" if math.isnan(iou) else f"{iou:.2f} %", f"{count}") for name, iou, count in shares
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *numbers in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True)]
        report("  ".join([f"{first:<{widths[0]}}", *cells]))
    report(str(scores))
    return 0


def pairs_of(segmenter: LoadedSegmenter, options: argparse.Namespace) -> PairSource:
    """The pairs to evaluate on; what was left out is told."""
    from convnextv2.segmentation.pairs import IMAGES, PairSource, find_files, find_parts

    data, wanted = options.data, segmenter.wanted(options.max_pixels)
    if (data / "val" / IMAGES).is_dir():
        files = find_files(data / "val", segmenter.in_chans, wanted)
    elif options.all:
        files = find_files(data, segmenter.in_chans, wanted)
    else:
        _, files = find_parts(data, segmenter.in_chans, wanted, options.val_fraction, options.seed)
    _cli.say_skipped(files.skipped)
    return PairSource(files.images, files.masks, segmenter.in_chans, classes_for(segmenter, data), wanted)


def classes_for(segmenter: LoadedSegmenter, data: Path) -> Classes:
    """The classes of a checkpoint, by the values that they have in DATA, if that says so."""
    own, file = segmenter.classes, data / CLASSES_FILE
    if not file.is_file():
        return own
    values = dict(zip(*read_classes(file), strict=True))
    if values.keys() != set(own.names):
        others = ", ".join(sorted(values.keys() ^ set(own.names)))
        raise DataError(f"{file}: has other classes than the checkpoint; not in both: {others}")
    there = tuple(values[name] for name in own.names)
    return Classes(own.names, there, None if own.ignored in there else own.ignored)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"train": train, "predict": predict, "evaluate": evaluate}

"""Classify images with a fine-tuned checkpoint and write a table.

Results are in the order of the file names: file, predicted_class, probability, then top1_class, top1_probability and so
on, and error. An image that cannot be read keeps its row: its class is empty and the reason is in the column error.
With --window a row is of a window of an image, and x and y are the pixel in its upper left corner; windows that are
mostly no data are left out. --columns chooses others, as --columns file,class --no-header does for the results.csv of
small training repositories.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from convnextv2.commands import _cli
from convnextv2.data.decoding import Wanted
from convnextv2.evaluation.choices import PRECISIONS
from convnextv2.outputs import Kind, check_output, is_stream, output_text
from convnextv2.training.hardware import COMPILE_MODES

if TYPE_CHECKING:
    from convnextv2.data.windows import WindowSource
    from convnextv2.evaluation.prediction import Prediction

HEADER = ("file", "predicted_class", "probability")
TABLE = Kind("a table of predictions", (".csv",), lambda path: _cli.starts_with(path, ",".join(HEADER).encode()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load, predict, report."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "checkpoint", type=_cli.checkpoint, help="of a fine-tuning: file, run folder, published name or address"
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="image files, and folders of images")
    _cli.add_output(parser, "results.csv", "table to write, - for standard output")
    parser.add_argument(
        "--columns",
        type=columns,
        help="what to write, with commas between: of file, name (of the file, without folders), class (or "
        "predicted_class), probability, error, top1_class, top1_probability and so on, with --window x and y; default: "
        "all but name",
    )
    parser.add_argument(
        "--no-header",
        action="store_true",
        help="leave the line of names out; such a table is replaced with --overwrite",
    )
    parser.add_argument("--topk", type=_cli.positive_int, default=5, help="likeliest classes to list; at most all")
    parser.add_argument("--batch-size", type=_cli.positive_int, default=64, help="images at a time")
    parser.add_argument("--img-size", type=_cli.image_size, help="pixels, 224 or 192x256; default: the checkpoint's")
    parser.add_argument("--device", type=_cli.device, default="auto", help="cpu, cuda, cuda:1, or auto")
    _cli.add_workers(parser)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto (bf16 on a GPU that has it, else no), no, bf16, fp16",
    )
    parser.add_argument("--compile", choices=COMPILE_MODES, help="torch.compile with this mode; default: not at all")
    _cli.add_max_pixels(parser)
    _cli.add_window(parser)
    options = parser.parse_args(arguments)

    from convnextv2.evaluation.prediction import load_classifier, predict_images, right_by_folder

    inputs = [options.checkpoint, *options.inputs]
    check_output(options.output, TABLE, inputs=inputs, overwrite=options.overwrite)
    report = _cli.warn if is_stream(options.output) else _cli.say

    classifier = load_classifier(options.checkpoint, device=options.device, img_size=options.img_size)
    dataset = classifier.dataset(options.inputs, Wanted(options.max_pixels, window=options.window))
    _cli.say_skipped(dataset.skipped)
    topk = min(options.topk, len(classifier.classes))
    windows = getattr(dataset, "windows", None)
    wanted = chosen(options.columns, topk, windows is not None)
    predictions = predict_images(
        classifier,
        dataset,
        topk=topk,
        batch_size=options.batch_size,
        workers=options.workers,
        precision=options.precision,
        compile=options.compile,
        progress=partial(_cli.progress, description="predict"),
    )
    with output_text(options.output) as file:
        done = write_table(file, predictions, wanted, not options.no_header, classifier.words, windows)
    unreadable = [(prediction.file, prediction.error) for prediction in done if prediction.error]
    classified = [prediction for prediction in done if not prediction.error]
    _cli.say_skipped(unreadable)
    if windows is None:
        report(f"{len(classified)} images classified, {len(unreadable)} unreadable: {options.output}")
    else:
        without = len(windows) - len(done)
        told = f"{len(classified)} windows classified, {len(unreadable)} unreadable, {without} mostly without data"
        report(f"{told}: {options.output}")
    right = right_by_folder(classified, classifier.classes)
    if right is not None:
        report(f"accuracy by the folders' names: {right / len(classified):.2%} ({right} of {len(classified)})")


def columns(text: str) -> tuple[str, ...]:
    """Names of columns from text with commas between; an argparse type. ``class`` is short for the predicted one."""
    return tuple({"class": "predicted_class"}.get(name, name) for name in map(str.strip, text.split(",")))


def chosen(names: Sequence[str] | None, topk: int, windowed: bool = False) -> tuple[str, ...]:
    """The columns to write, all but the name by default; ValueError if there is one that is not known."""
    ranked = [f"top{place}_{what}" for place in range(1, topk + 1) for what in ("class", "probability")]
    every = (*HEADER, *ranked, "error", *(("x", "y") if windowed else ()))
    if unknown := [name for name in names or () if name not in (*every, "name")]:
        raise ValueError(f"there is no column {unknown[0]!r:.40}; choose of {', '.join((*every, 'name'))}")
    return tuple(names or every)


def write_table(
    file: TextIO,
    predictions: Iterable[Prediction],
    names: Sequence[str],
    header: bool,
    words: Mapping[str, str],
    windows: WindowSource | None = None,
) -> list[Prediction]:
    """Write the rows as the predictions come, and return these; ``words`` stand behind the names of classes.

    Of ``windows`` those that are mostly no data are left out.
    """
    from convnextv2.data.windows import MOSTLY_NO_DATA

    table, done = csv.writer(file), []
    if header:
        table.writerow(names)
    for number, prediction in enumerate(predictions):
        if windows is not None and prediction.error == MOSTLY_NO_DATA:
            continue
        path, corner = prediction.file, dict[str, str]()
        if windows is not None:
            (top, left, *_), path = windows.box(number), windows.scenes[windows.scene_of(number)]
            corner = {"x": str(left), "y": str(top)}
        row = {"file": _cli.plain_name(str(path)), "name": _cli.plain_name(path.name), **corner}
        row["error"] = _cli.plain_cell(prediction.error)
        for place, (name, value) in enumerate(zip(prediction.classes, prediction.probabilities, strict=True), 1):
            told = _cli.plain_cell(f"{name} {words[name]}" if name in words else name)
            row[f"top{place}_class"], row[f"top{place}_probability"] = told, f"{value:.6f}"
        row |= {"predicted_class": row.get("top1_class", ""), "probability": row.get("top1_probability", "")}
        table.writerow([row.get(name, "") for name in names])
        done.append(prediction)
    return done

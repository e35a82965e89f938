"""Classify images with a fine-tuned checkpoint and write a table.

Results are in the order of the file names: file, predicted_class, probability, then top1_class, top1_probability and so
on, and error. An image that cannot be read keeps its row: its class is empty and the reason is in the column error.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

import _cli

from convnextv2.data.decoding import Wanted
from convnextv2.evaluation.inference import PRECISIONS
from convnextv2.evaluation.prediction import Prediction, load_classifier, predict_images, right_by_folder
from convnextv2.outputs import Kind, check_output, is_stream, output_text
from convnextv2.training.options import COMPILE_MODES

HEADER = ("file", "predicted_class", "probability")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a cell begins that spreadsheets run. A file's name gets ``./`` in front, which leaves it what it was."""
TABLE = Kind("a table of predictions", (".csv",), lambda path: _cli.starts_with(path, ",".join(HEADER).encode()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load, predict, report."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a fine-tuning run, or its run folder")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="image files, and folders of images")
    _cli.add_output(parser, "results.csv", "table to write, - for standard output")
    parser.add_argument("--topk", type=_cli.positive_int, default=5, help="likeliest classes to list; at most all")
    parser.add_argument("--batch-size", type=_cli.positive_int, default=64, help="images at a time")
    parser.add_argument("--img-size", type=_cli.image_size, help="pixels, 224 or 192x256; default: the checkpoint's")
    parser.add_argument("--device", type=_cli.device, default="auto", help="cpu, cuda, cuda:1, or auto")
    parser.add_argument("--workers", type=int, help="processes that decode images; default: by the number of images")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto (bf16 on a GPU that has it, else no), no, bf16, fp16",
    )
    parser.add_argument("--compile", choices=COMPILE_MODES, help="torch.compile with this mode; default: not at all")
    _cli.add_max_pixels(parser)
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 0:
        parser.error(f"argument --workers: must not be negative, got {options.workers}")
    inputs = [options.checkpoint, *options.inputs]
    check_output(options.output, TABLE, inputs=inputs, overwrite=options.overwrite)
    report = _cli.warn if is_stream(options.output) else _cli.say

    classifier = load_classifier(options.checkpoint, device=options.device, img_size=options.img_size)
    dataset = classifier.dataset(options.inputs, Wanted(options.max_pixels))
    _cli.say_skipped(dataset.skipped)
    topk = min(options.topk, len(classifier.classes))
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
        done = write_table(file, predictions, topk)
    unreadable = [(prediction.file, prediction.error) for prediction in done if prediction.error]
    classified = [prediction for prediction in done if not prediction.error]
    _cli.say_skipped(unreadable)
    report(f"{len(classified)} images classified, {len(unreadable)} unreadable: {options.output}")
    right = right_by_folder(classified, classifier.classes)
    if right is not None:
        report(f"accuracy by the folders' names: {right / len(classified):.2%} ({right} of {len(classified)})")


def plain_cell(text: str) -> str:
    """The text, which a spreadsheet would otherwise take for a formula, behind an apostrophe."""
    return f"'{text}" if text.startswith(FORMULA) else text


def write_table(file: TextIO, predictions: Iterable[Prediction], topk: int) -> list[Prediction]:
    """Write the rows as the predictions come, and return these."""
    table, done = csv.writer(file), []
    ranked = [f"top{place}_{what}" for place in range(1, topk + 1) for what in ("class", "probability")]
    table.writerow([*HEADER, *ranked, "error"])
    for prediction in predictions:
        values = [f"{value:.6f}" for value in prediction.probabilities]
        pairs = [cell for pair in zip(prediction.classes, values, strict=True) for cell in pair]
        cells = [*pairs[:2], *pairs] if pairs else [""] * (2 + 2 * topk)
        file_name = str(prediction.file)
        safe = f"./{file_name}" if file_name.startswith(FORMULA) else file_name
        table.writerow([safe, *map(plain_cell, cells), plain_cell(prediction.error)])
        done.append(prediction)
    return done


if __name__ == "__main__":
    _cli.run(main)

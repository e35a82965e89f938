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

from convnextv2.evaluation.prediction import Prediction, load_classifier, predict_images, right_by_folder
from convnextv2.files import atomic_path


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load, predict, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a fine-tuning run, or its run folder")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="image files, and folders of images")
    parser.add_argument("--output", type=Path, default=Path("results.csv"), help="table to write")
    parser.add_argument("--topk", type=_cli.positive_int, default=5, help="likeliest classes to list; at most all")
    parser.add_argument("--batch-size", type=_cli.positive_int, default=64, help="images at a time")
    parser.add_argument("--img-size", type=_cli.image_size, help="pixels, 224 or 192x256; default: the checkpoint's")
    parser.add_argument("--device", type=_cli.device, default="auto", help="cpu, cuda, cuda:1, or auto")
    parser.add_argument("--workers", type=int, help="processes that decode images; default: by the number of images")
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 0:
        parser.error(f"argument --workers: must not be negative, got {options.workers}")
    if options.output.is_dir():
        parser.error(f"argument --output: {options.output} is a folder; name a file in it")

    classifier = load_classifier(options.checkpoint, device=options.device, img_size=options.img_size)
    dataset = classifier.dataset(options.inputs)
    _cli.say_skipped(dataset.skipped)
    topk = min(options.topk, len(classifier.classes))
    predictions = predict_images(
        classifier,
        dataset,
        topk=topk,
        batch_size=options.batch_size,
        workers=options.workers,
        progress=partial(_cli.progress, description="predict"),
    )
    with (
        atomic_path(options.output) as temporary,
        # Names that are not valid Unicode are written with escapes rather than not at all.
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        done = write_table(file, predictions, topk)
    unreadable = [(prediction.file, prediction.error) for prediction in done if prediction.error]
    classified = [prediction for prediction in done if not prediction.error]
    _cli.say_skipped(unreadable)
    _cli.say(f"{len(classified)} images classified, {len(unreadable)} unreadable: {options.output}")
    right = right_by_folder(classified, classifier.classes)
    if right is not None:
        _cli.say(f"accuracy by the folders' names: {right / len(classified):.2%} ({right} of {len(classified)})")


def write_table(file: TextIO, predictions: Iterable[Prediction], topk: int) -> list[Prediction]:
    """Write the rows as the predictions come, and return these."""
    table, done = csv.writer(file), []
    ranked = [f"top{place}_{what}" for place in range(1, topk + 1) for what in ("class", "probability")]
    table.writerow(["file", "predicted_class", "probability", *ranked, "error"])
    for prediction in predictions:
        values = [f"{value:.6f}" for value in prediction.probabilities]
        pairs = [cell for pair in zip(prediction.classes, values, strict=True) for cell in pair]
        cells = [*pairs[:2], *pairs] if pairs else [""] * (2 + 2 * topk)
        table.writerow([prediction.file, *cells, prediction.error])
        done.append(prediction)
    return done


if __name__ == "__main__":
    _cli.run(main)

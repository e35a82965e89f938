"""Classify images with a fine-tuned checkpoint and write a table.

Results are in the order of the file names: file, predicted_class, probability, then top1_class, top1_probability and so
on, and error. An image that cannot be read keeps its row: its class is empty and the reason is in the column error.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import _cli
import torch
from torch.utils.data import DataLoader

from convnextv2 import ConvNeXtV2
from convnextv2.data.build import build_predict_dataset
from convnextv2.data.datasets import PredictDataset
from convnextv2.data.transforms import preprocessing_from_metadata
from convnextv2.files import atomic_path
from convnextv2.models.config import check_image_size
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from convnextv2.weights.loading import load_model


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

    checkpoint = load_checkpoint(options.checkpoint)
    model = load_model(checkpoint.path, device=options.device).eval()
    if not isinstance(model, ConvNeXtV2) or model.config.num_classes == 0:
        raise CheckpointError(f"{checkpoint.path}: has no classifier; fine-tune it first (scripts/finetune.py)")
    classes = class_names(checkpoint, model)
    encoder = model.encoder_config
    mean, std, img_size = preprocessing_from_metadata(checkpoint.metadata, encoder.in_chans)
    img_size = options.img_size or img_size
    check_image_size(img_size, encoder.patch_size)
    dataset = build_predict_dataset(options.inputs, img_size, encoder.in_chans, mean, std)
    _cli.say_skipped(dataset.skipped)
    topk = min(options.topk, len(classes))

    with (
        atomic_path(options.output) as temporary,
        # Names that are not valid Unicode are written with escapes rather than not at all.
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        predicted, unreadable = predict(model, dataset, classes, topk, options, file)
    _cli.say_skipped(unreadable)
    _cli.say(f"{len(dataset) - len(unreadable)} images classified, {len(unreadable)} unreadable: {options.output}")
    report_accuracy(predicted, classes)


def predict(
    model: ConvNeXtV2,
    dataset: PredictDataset,
    classes: Sequence[str],
    topk: int,
    options: argparse.Namespace,
    file: TextIO,
) -> tuple[list[tuple[Path, str]], list[tuple[Path, str]]]:
    """Write the rows; return (file, class) of what was classified and (file, reason) of what was not."""
    table = csv.writer(file)
    places = range(1, topk + 1)
    ranked = [f"top{place}_{what}" for place in places for what in ("class", "probability")]
    table.writerow(["file", "predicted_class", "probability", *ranked, "error"])
    many = len(dataset) >= 8 * options.batch_size
    workers = (min(4, os.cpu_count() or 1) if many else 0) if options.workers is None else options.workers
    loader = DataLoader(dataset, batch_size=options.batch_size, num_workers=workers)
    predicted, unreadable = [], []
    for images, indices, reasons in _cli.progress(loader, description="predict"):
        with torch.inference_mode():
            probabilities = model(images.to(options.device)).float().softmax(1).cpu()
        best, order = probabilities.topk(topk)
        for row, index in enumerate(indices.tolist()):
            path = dataset.files[index]
            if reasons[row]:
                unreadable.append((path, reasons[row]))
                table.writerow([path, *[""] * (2 + 2 * topk), reasons[row]])
                continue
            names = [classes[number] for number in order[row].tolist()]
            values = [f"{value:.6f}" for value in best[row].tolist()]
            pairs = [cell for pair in zip(names, values, strict=True) for cell in pair]
            table.writerow([path, names[0], values[0], *pairs, ""])
            predicted.append((path, names[0]))
    return predicted, unreadable


def class_names(checkpoint: Checkpoint, model: ConvNeXtV2) -> list[str]:
    """Names from the checkpoint, else from class_indices.json beside it or in its run folder, else numbers."""
    number = model.config.num_classes
    if model.config.class_names:
        return list(model.config.class_names)
    for folder in (checkpoint.path.parent, checkpoint.path.parent.parent):
        file = folder / "class_indices.json"
        if not file.is_file():
            continue
        try:
            indices = json.loads(file.read_text(encoding="utf-8"))
            return [str(indices[str(index)]) for index in range(number)]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f'{file}: expected {{"0": "name", ...}} for {number} classes, which {checkpoint.path} has; '
                f"repair or remove it ({type(error).__name__}: {error})"
            ) from error
    return [str(index) for index in range(number)]


def report_accuracy(predicted: Sequence[tuple[Path, str]], classes: Sequence[str]) -> None:
    """Print the top-1 accuracy if every image lies in a folder named like a class (the nearest such one counts)."""
    known = set(classes)
    true = [next((part.name for part in path.absolute().parents if part.name in known), None) for path, _ in predicted]
    if not predicted or None in true:
        return
    right = sum(name == label for (_, name), label in zip(predicted, true, strict=True))
    _cli.say(f"accuracy by the folders' names: {right / len(predicted):.2%} ({right} of {len(predicted)})")


if __name__ == "__main__":
    _cli.run(main)

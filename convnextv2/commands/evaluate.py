"""Say how good the features of a frozen network are, or how right a classifier is, on labelled images.

knn lets the nearest training images vote, linear fits a logistic regression to the training images' features, classify
asks the checkpoint's own head; all are measured on the validation images. DATA is what fcmae finetune takes: it holds
train/ and val/, or is split as there, with the same --seed and --val-fraction into the same parts. Examples:
  fcmae evaluate knn runs/pretrain photos
  fcmae evaluate linear runs/pretrain photos --label-fraction 0.1 --output results.json --confusion confusion.png
  fcmae evaluate knn runs/pretrain photos --untrained
  fcmae evaluate classify runs/finetune photos
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from convnextv2.commands import _cli
from convnextv2.data import DataError, Wanted
from convnextv2.evaluation.choices import NEIGHBOURS
from convnextv2.files import finite
from convnextv2.models.config import POOLINGS
from convnextv2.outputs import Kind, check_output, is_stream, output_path, output_text
from convnextv2.weights.addresses import shown

if TYPE_CHECKING:
    from convnextv2.data import ImageDataset
    from convnextv2.evaluation import Scores
    from convnextv2.evaluation.frozen import FrozenEncoder

RESULT = Kind("an evaluation", (".json",), lambda path: _cli.starts_with(path, b'{\n  "evaluation": '))
OF_FEATURES = {"pooling": "mean", "label_fraction": 1.0, "untrained": False}
"""Options that classify does not have."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, evaluate, report."""
    options = parse(arguments)

    from convnextv2.training.pictures import PICTURE, save_confusion_matrix
    from convnextv2.training.reliability import save_reliability

    inputs = [options.checkpoint, options.data]
    places = [path for path in (options.output, options.confusion, options.calibration) if path is not None]
    for path in places:
        kind = RESULT if path == options.output else PICTURE
        check_output(path, kind, inputs=inputs, overwrite=options.overwrite)
    words, about, scores = classify(options) if options.what == "classify" else evaluate_features(options)
    if options.confusion is not None:
        save_confusion_matrix(options.confusion, scores.confusion, scores.classes)
    assert scores.calibration is not None
    if options.calibration is not None:
        save_reliability(options.calibration, scores.calibration)
    if options.output is not None:
        given = {"evaluation": options.what, "checkpoint": shown(options.checkpoint), "data": options.data}
        drawn = {"val_fraction": options.val_fraction, "seed": options.seed}
        with output_text(options.output) as file:
            file.write(json.dumps(finite({**given, **about, **drawn, **scores.as_dict()}), indent=2) + "\n")
    report = _cli.warn if any(map(is_stream, places)) else _cli.say
    shares = scores.top1, scores.macro_f1, scores.calibration.auroc, scores.calibration.error
    row = words, *("–" if math.isnan(share) else f"{share:.2f} %" for share in shares), f"{scores.images}"
    widths = [max(map(len, column)) for column in zip(row, HEADINGS, strict=True)]
    for cells in (HEADINGS, row):
        first, *numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        report("  ".join([f"{first.strip():<{widths[0]}}", *numbers]))


HEADINGS = ("what", "top-1", "macro F1", "AUROC", "cal. error", "images")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked against each other."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("knn", "linear", "classify"), help="how to evaluate")
    text = "of any kind: file, run folder, published name or address"
    parser.add_argument("checkpoint", type=_cli.checkpoint, metavar="CHECKPOINT", help=text)
    parser.add_argument("data", metavar="DATA", help="folder of labelled images, or 'digits'")
    parser.add_argument("--output", type=output_path, help="JSON file to write, - for standard output; default: none")
    parser.add_argument("--confusion", type=output_path, help="PNG file to draw the confusion matrix in; default: none")
    text = "PNG file to draw accuracy against confidence in; default: none"
    parser.add_argument("--calibration", type=output_path, help=text)
    parser.add_argument("--overwrite", action="store_true", help="let the outputs replace files of another kind")
    features = parser.add_argument_group("of knn and linear")
    features.add_argument(
        "--pooling", choices=POOLINGS, help="over the last map's cells, or of the maps of all stages; default: mean"
    )
    text = "share of every class's training images to learn from, drawn by --seed; default: 1"
    features.add_argument("--label-fraction", type=_cli.share, metavar="SHARE", help=text)
    text = "random weights, by --seed, instead of the checkpoint's: what training has to beat"
    features.add_argument("--untrained", action="store_true", default=None, help=text)
    features.add_argument("--k", type=_cli.positive_int, help=f"neighbours, of knn; default: {NEIGHBOURS}")
    parser.add_argument("--seed", type=_cli.seed, default=0, help="of everything that is drawn; default: 0")
    text = "share of every class to validate on, where DATA has no train/ and val/ folders; default: 0.2"
    parser.add_argument("--val-fraction", type=float, default=0.2, metavar="SHARE", help=text)
    _cli.add_reading(parser)
    options = parser.parse_args(arguments)
    places = [path for path in (options.output, options.confusion, options.calibration) if path is not None]
    if len({path.resolve() for path in places}) < len(places):
        parser.error("--output, --confusion and --calibration need places of their own")
    if options.k is not None and options.what != "knn":
        parser.error(f"--k is for knn, not for {options.what}")
    for name, default in OF_FEATURES.items():
        if options.what == "classify" and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is for knn and linear; classify learns nothing")
        setattr(options, name, default if getattr(options, name) is None else getattr(options, name))
    return options


def parts(encoder: FrozenEncoder, options: argparse.Namespace) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation images; what was left out is told."""
    drawn = {"val_fraction": options.val_fraction, "seed": options.seed}
    found = encoder.datasets(options.data, wanted=Wanted(options.max_pixels, window=options.window), **drawn)
    _cli.say_skipped([*found[0].skipped, *found[1].skipped])
    return found


def evaluate_features(options: argparse.Namespace) -> tuple[str, dict[str, Any], Scores]:
    """What was done, in words and for the result, and how right it was."""
    from convnextv2.data.plain import label_fraction
    from convnextv2.evaluation import extract_features, fit_linear, knn_votes, linear_predict, load_encoder, score
    from convnextv2.evaluation.linear import linear_probabilities

    untrained = options.seed if options.untrained else None
    where: dict[str, Any] = {"device": options.device, "img_size": options.img_size}
    encoder = load_encoder(options.checkpoint, untrained=untrained, **where)
    training, validation = parts(encoder, options)
    chosen = label_fraction(training, options.label_fraction, options.seed)
    train, val = (
        extract_features(
            encoder.model,
            images,
            pooling=options.pooling,
            batch_size=options.batch_size,
            workers=options.workers,
            progress=partial(_cli.progress, description=f"{part} features"),
        )
        for part, images in (("training", chosen), ("validation", validation))
    )
    _cli.say_skipped([*train.unreadable, *val.unreadable])
    own: dict[str, Any]
    if options.what == "knn":
        own = {"k": min(options.k or NEIGHBOURS, len(train))}
        votes = knn_votes(train, val.values, device=options.device, **own)
        predicted, probabilities = votes.argmax(1), votes / votes.sum(1, keepdim=True)
    else:
        pipeline = fit_linear(train, seed=options.seed)
        own = {"C": pipeline[-1].C}
        predicted = linear_predict(pipeline, val.values)
        probabilities = linear_probabilities(pipeline, val.values, len(val.classes))
    settings = {name: getattr(options, name) for name in OF_FEATURES}
    about = {**own, **settings, "img_size": encoder.img_size, "train_images": len(train)}
    words = [options.what, *(f"{name} {value:g}" for name, value in own.items()), options.pooling]
    words += [f"{options.label_fraction:g} of the labels"] if options.label_fraction < 1 else []
    words += ["untrained"] if options.untrained else []
    return ", ".join(words), about, score(predicted, val.labels, val.classes, probabilities)


def classify(options: argparse.Namespace) -> tuple[str, dict[str, Any], Scores]:
    """The same of the checkpoint's own head."""
    import torch

    from convnextv2.data.plain import PlainDataset
    from convnextv2.evaluation import score
    from convnextv2.evaluation.answers import class_probabilities
    from convnextv2.evaluation.frozen import FrozenEncoder
    from convnextv2.evaluation.prediction import load_classifier

    classifier = load_classifier(options.checkpoint, device=options.device, img_size=options.img_size)
    prepared = classifier.mean, classifier.std, classifier.img_size
    _, validation = parts(FrozenEncoder(classifier.model, *prepared, classifier.reading), options)
    number = {name: index for index, name in enumerate(classifier.classes)}
    true = [validation.classes[label] for label in validation.labels or ()]
    if unknown := sorted(set(true) - number.keys()):
        raise DataError(
            f"{options.data}: holds classes that {shown(options.checkpoint)} does not: {', '.join(unknown)}; "
            f"it knows {', '.join(classifier.classes)}"
        )
    probabilities, readable, unreadable = class_probabilities(
        classifier,
        PlainDataset(validation),
        batch_size=options.batch_size,
        workers=options.workers,
        progress=partial(_cli.progress, description="classify"),
    )
    _cli.say_skipped(unreadable)
    labels = torch.tensor([number[true[index]] for index in readable])
    scores = score(probabilities.argmax(1), labels, classifier.classes, probabilities)
    return "classify", {"img_size": classifier.img_size}, scores

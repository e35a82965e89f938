"""Write a model card for weights that are to be passed on: what they are, how they were made, how good they are.

Facts come from the run folder (recipe, loss, steps, time) and from results of fcmae evaluate; what a program cannot
know, the images and their licence, is given in words. The card is Markdown with the header that the Hugging Face hub
reads.
Examples:
  fcmae evaluate linear runs/pretrain photos --output linear.json
  fcmae convert runs/pretrain backbone.safetensors
  fcmae model-card runs/pretrain --weights backbone.safetensors --evaluation linear.json \\
      --images "3,000 photographs of our greenhouse" --licence cc-by-4.0 --limit "Only plants." --output MODEL_CARD.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from convnextv2 import ClassifierConfig, EncoderConfig, FCMAEConfig
from convnextv2.commands import _cli
from convnextv2.outputs import Kind, check_output, is_stream, output_text
from convnextv2.training import FinetuneOptions, PretrainOptions
from convnextv2.training.recipe import recipe_text

if TYPE_CHECKING:
    from convnextv2.evaluation.frozen import FrozenEncoder

CARD = Kind("a model card", (".md",), lambda path: _cli.starts_with(path, b"---\n"))
KINDS = {
    FCMAEConfig: "A masked autoencoder (FCMAE), pre-trained without labels,",
    ClassifierConfig: "A classifier",
    EncoderConfig: "The encoder, without decoder or head,",
}
PLACES = {"data", "output", "init", "resume", "overwrite", "device", "workers", "tracker", "cache"}
"""Options that tell where a run was, not what it did."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, gather, write."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=_cli.checkpoint, help="run folder, or a checkpoint, of which less is known")
    _cli.add_output(parser, "MODEL_CARD.md", "Markdown file to write, - for standard output")
    parser.add_argument("--name", help="of the model; default: that of the run folder")
    parser.add_argument("--images", required=True, metavar="TEXT", help="what it was trained on, in words")
    parser.add_argument("--licence", required=True, help="of the weights, by its identifier, such as cc-by-4.0")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="file that is passed on; its checksum is told")
    parser.add_argument(
        "--evaluation", nargs="+", type=Path, default=[], metavar="JSON", help="results of fcmae evaluate --output"
    )
    parser.add_argument("--limit", nargs="+", default=[], metavar="TEXT", help="what the weights are not for")
    options = parser.parse_args(arguments)
    inputs = [options.checkpoint, *options.evaluation, *([options.weights] if options.weights else [])]
    check_output(options.output, CARD, inputs=inputs, overwrite=options.overwrite)
    text = card(options)
    with output_text(options.output) as file:
        file.write(text)
    (_cli.warn if is_stream(options.output) else _cli.say)(f"model card: {options.output}")


def card(options: argparse.Namespace) -> str:
    """The whole text."""
    from convnextv2.evaluation import load_encoder
    from convnextv2.weights import load_checkpoint, read_checkpoint, weights_config

    checkpoint = load_checkpoint(options.checkpoint)
    config = checkpoint.config or weights_config(read_checkpoint(checkpoint))
    encoder = load_encoder(checkpoint)
    given = checkpoint.path if isinstance(options.checkpoint, str) else options.checkpoint
    name = options.name or given.absolute().name.removesuffix(given.suffix)
    results = [evaluation(path) for path in options.evaluation]
    shape = encoder.model.encoder_config
    size = sum(parameter.numel() for parameter in encoder.model.parameters())
    widths = f"depths {spell(shape.depths)}, widths {spell(shape.dims)}, patches of {shape.patch_size}"
    parts = [
        header(name, options.licence, results),
        f"# {name}",
        f"{KINDS[type(config)]} of ConvNeXt V2: {widths}, {shape.in_chans} channels in. "
        f"The encoder has {size:,} parameters.",
        "## Data",
        options.images,
        training(given),
        table(results),
        use(options.weights),
        "## Limits",
        "\n".join(f"- {limit}" for limit in [*options.limit, preprocessing(encoder)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def spell(numbers: Sequence[Any]) -> str:
    """One after the other."""
    return " ".join(str(number) for number in numbers)


def header(name: str, licence: str, results: list[dict[str, Any]]) -> str:
    """What the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    found = [
        EvalResult(
            task_type="image-classification",
            dataset_type="images",
            dataset_name=Path(row["data"]).name,
            metric_type="accuracy",
            metric_name=described(row),
            metric_value=round(row["top1"] / 100, 4),
        )
        for row in results
        if not row.get("untrained")  # which is no result of these weights
    ]
    data = ModelCardData(
        license=licence,
        tags=["convnextv2", "fcmae", "masked-image-modeling", "image-feature-extraction"],
        model_name=name,
        eval_results=found or None,
    )
    return f"---\n{data.to_yaml().strip()}\n---"


def evaluation(path: Path) -> dict[str, Any]:
    """A result of fcmae evaluate; ValueError if the file is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        right = isinstance(found, dict) and {"evaluation", "data", "top1", "macro_f1", "images"} <= found.keys()
    except (ValueError, RecursionError):
        right = False
    if not right:
        raise ValueError(f"{path}: is no result of fcmae evaluate --output")
    return dict(found)


def described(row: dict[str, Any]) -> str:
    """What was measured, in words."""
    words = [row["evaluation"], row.get("pooling", "")]
    words += ["untrained"] if row.get("untrained") else []
    words += [f"{100 * share:g} % of the labels" for share in [row.get("label_fraction", 1)] if share < 1]
    return ", ".join(word for word in words if word)


def training(run: Path) -> str:
    """Recipe and course of the run, where its folder is there."""
    recipe = run / "config.yaml"
    if not recipe.is_file():
        return ""
    given = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    loss = "loss" if "mask_ratio" in given else "train_loss"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if not rows or not all({"epoch", "step", loss, "seconds"} <= row.keys() for row in rows):
        raise ValueError(f"{run / 'metrics.jsonl'}: does not tell the course of a run")
    kind = PretrainOptions if "mask_ratio" in given else FinetuneOptions
    usual = yaml.safe_load(recipe_text(kind()))
    lines = [
        f"| {key} | {spell(value) if isinstance(value, list) else value} |"
        for key, value in given.items()
        if key not in PLACES and (key in ("model", "epochs", "batch_size", "seed") or usual.get(key) != value)
    ]
    course = f"{rows[-1]['epoch']} epochs, {rows[-1]['step']:,} steps, {sum(row['seconds'] for row in rows) / 60:.0f} "
    course += f"minutes of training; loss {rows[0][loss]:.3f} after the first epoch, {rows[-1][loss]:.3f} at the end."
    return "\n".join(["## Training", "", course, "", "| option | value |", "|---|---|", *lines])


def table(results: list[dict[str, Any]]) -> str:
    """What fcmae evaluate measured."""
    if not results:
        return ""
    lines = [
        f"| {described(row)} | {row['images']} | {row['top1']:.1f} % | {row['macro_f1']:.1f} % |" for row in results
    ]
    return "\n".join(["## Evaluation", "", "| what | images | top-1 | macro F1 |", "|---|---|---|---|", *lines])


def use(weights: Path | None) -> str:
    """How to load the file that is passed on."""
    from convnextv2.weights.download import sha256

    name = weights.name if weights else "WEIGHTS.safetensors"
    parts = [
        "## Use",
        f"```\nfcmae finetune --config small --data FOLDER --output runs/finetune \\\n    --init {name}\n```",
        f"```python\nfrom convnextv2.evaluation import load_encoder\n\nencoder = load_encoder({name!r}).model\n"
        "features = encoder.forward_features(images)  # [B, C, H, W]\n```",
    ]
    if weights is not None:
        parts.append(f"`{name}`: {weights.stat().st_size:,} bytes, SHA-256 `{sha256(weights)}`.")
    return "\n\n".join(parts)


def preprocessing(encoder: FrozenEncoder) -> str:
    """What images must be like."""
    statistics = " and ".join(spell([f"{value:.3f}" for value in values]) for values in (encoder.mean, encoder.std))
    height, width = encoder.img_size
    native = encoder.reading.get("pixels") == "native"
    units = "in the units of their files" if native else "scaled to 0 … 1"
    return f"Images of {height} × {width} pixels, {units}, normalised by mean and standard deviation {statistics}."

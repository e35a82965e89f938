"""How far a few labels go: fine-tuned from pre-trained weights, from scratch, and a linear probe of frozen features.

DATA holds train/ and val/ folders of classes. Of each class a share of train/ is drawn, the same images for all; those
of a smaller share are among those of a larger one. Accuracy on val/ is that of the last epoch: the best epoch would be
chosen on val/. Each part is kept in OUTPUT when it is done; a second call leaves out what is there, so parts may be
measured by several calls at once, and ``--json`` of a call gathers all of them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import hardware
from numpy.typing import NDArray

from convnextv2.data.build import build_finetune_datasets
from convnextv2.data.datasets import ImageDataset
from convnextv2.files import write_json
from convnextv2.models.classifier import create_model
from convnextv2.training import FinetuneOptions, finetune
from convnextv2.training.finetuning import resolve
from convnextv2.training.head_start import fit_head
from convnextv2.training.recipe import parse_options
from convnextv2.weights.loading import init_classifier

WAYS = ("probe", "probe-untrained", "pretrained", "scratch")


def draw_share(data: Path, percent: float, seed: int, folder: Path, held_out: int = 0) -> Path:
    """A folder of links: ``percent`` of each class of ``data/train``, at least one image, and ``data/val``.

    With ``held_out`` the validation part is that many images a class of ``data/train`` instead, of which none is drawn:
    for choices that ``data/val`` is to be kept out of.
    """
    for group in sorted(path for path in (data / "train").iterdir() if path.is_dir()):
        files = sorted(group.iterdir())
        taken = round(len(files) * percent / 100)
        validation = sorted((data / "val" / group.name).iterdir())
        if held_out:
            validation = random.Random(f"held out {group.name}").sample(files, held_out)
            files = sorted(set(files) - set(validation))
        random.Random(f"{seed} {group.name}").shuffle(files)
        for part, chosen in (("train", files[: max(1, taken)]), ("val", validation)):
            to = folder / part / group.name
            to.mkdir(parents=True, exist_ok=True)
            for path in chosen:
                if not (to / path.name).is_symlink():
                    (to / path.name).symlink_to(path.resolve())
    return folder


def pooled(model: Any, images: ImageDataset, batch_size: int = 64) -> tuple[dict[str, NDArray[np.float32]], Any]:
    """Mean ``[N, C]``, and mean and standard deviation ``[N, 2C]``, of the last stage over its cells; and labels."""
    plain = replace(images, transform=images.plain_transform)
    means, deviations, labels = [], [], []
    for first in range(0, len(plain), batch_size):
        samples = [plain[number] for number in range(first, min(first + batch_size, len(plain)))]
        with torch.no_grad():
            features = model.forward_features(torch.stack([image for image, _ in samples]))
        means.append(features.mean((2, 3)))
        deviations.append(features.std((2, 3)))
        labels += [label for _, label in samples]
    mean, deviation = torch.cat(means), torch.cat(deviations)
    return {"mean": mean.numpy(), "mean and std": torch.cat([mean, deviation], 1).numpy()}, np.array(labels)


def probe(options: FinetuneOptions) -> dict[str, float]:
    """Top-1 of logistic regression on features of the encoder of ``init``, or of one that is not trained."""
    options, checkpoint, statistics = resolve(options)
    mean, std = statistics or (None, None)
    torch.manual_seed(options.seed)
    model = create_model(options.encoder(), num_classes=2).eval()
    if checkpoint is not None:
        init_classifier(model, checkpoint)
    parts = build_finetune_datasets(options.data, options.size, options.encoder().in_chans, mean=mean, std=std)
    (features, labels), (val_features, val_labels) = (pooled(model, part) for part in parts)
    found = {}
    for name in features:
        head = fit_head(features[name], labels, len(parts[0].classes))
        predicted = (val_features[name] @ head.weight.T + head.bias).argmax(1)
        found[name] = 100 * float((predicted == val_labels).mean())
    return found


def tune(options: FinetuneOptions) -> dict[str, float]:
    """Top-1 after the last epoch of a fine-tuning, and what is worth knowing beside it."""
    result = finetune(options)
    last = result.metrics[-1]
    return {
        "last epoch": last["val_top1"],
        "best epoch": result.best_top1,
        "first epoch": result.metrics[0]["val_top1"],
        "steps": last["step"],
        "training seconds": round(sum(row["seconds"] for row in result.metrics), 1),
    }


def measure(args: argparse.Namespace, given: list[str], way: str, percent: float, seed: int) -> None:
    """One part, unless it is there."""
    name = f"{way}-{percent:g}-{seed}"
    part = args.output / "parts" / f"{name}.json"
    if part.is_file():
        return
    data = draw_share(args.data, percent, seed, args.output / "data" / f"{percent:g}-{seed}", args.held_out)
    options = parse_options(FinetuneOptions, [*given, "--data", str(data), "--output", str(args.output / name)])
    options = replace(options, seed=seed, resume="auto", cache=args.output / "cache")
    if way in ("probe", "pretrained"):
        options = replace(options, init=args.init)
    start = time.perf_counter()
    found = tune(options) if way in ("pretrained", "scratch") else probe(options)
    images = sum(path.is_symlink() for path in (data / "train").rglob("*"))
    about = {"way": way, "percent": percent, "seed": seed, "images": images, "top1": found}
    part.parent.mkdir(parents=True, exist_ok=True)
    write_json(part, {**about, "seconds": round(time.perf_counter() - start, 1)})
    print(json.dumps(about), flush=True)


def table(results: list[dict[str, Any]]) -> str:
    """Mean top-1 of each way and share, with the values of the seeds."""
    cells: dict[tuple[float, str], list[float]] = {}
    for result in results:
        for name, top1 in result["top1"].items():
            if name in ("mean", "mean and std", "last epoch"):
                how = "" if name == "last epoch" else f", {name}"
                cells.setdefault((result["percent"], result["way"] + how), []).append(top1)
    rows = ["| labels | what | top-1, mean | seeds |", "|---|---|---|---|"]
    for (percent, what), values in sorted(cells.items()):
        each = ", ".join(f"{value:.1f}" for value in values)
        rows.append(f"| {percent:g} % | {what} | {statistics.mean(values):.1f} | {each} |")
    return "\n".join(rows)


def main() -> None:
    """Measure what is asked for and not there yet, then show all."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Takes options of scripts/finetune.py, too: --config, --model, --pooling, --img-size, --patch-size, "
        "--workers …",
    )
    parser.add_argument("data", type=Path, help="folder with train/ and val/")
    parser.add_argument("init", help="pre-trained checkpoint or run folder")
    parser.add_argument("output", type=Path, help="folder for links, runs and parts")
    parser.add_argument("--percent", type=float, nargs="+", default=[5, 10], help="shares of the labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the share and of the training")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--held-out", type=int, default=0, help="validate on so many images a class of train/ instead")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all parts, hardware and versions to this file")
    args, given = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    for seed in args.seeds:
        for percent in args.percent:
            for way in args.ways:
                measure(args, given, way, percent, seed)
    parts = sorted((args.output / "parts").glob("*.json"))
    results = [json.loads(path.read_text(encoding="utf-8")) for path in parts]
    print(table(results))
    if args.json is not None:
        versions = {name: version(name) for name in ("timm", "scikit-learn", "numpy")}
        facts = {**hardware(torch.device("cpu")), **versions}
        write_json(args.json, {"hardware": facts, "options": given, "results": results})


if __name__ == "__main__":
    main()

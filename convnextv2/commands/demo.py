"""The whole path on real images, in a few minutes on a laptop: pre-train, look, convert, fine-tune, predict.

Runs the other commands as a user would, shows them, and prints the evidence at the end. With ``--data FOLDER`` on your
own images: a folder of class folders, or of ``train`` and ``val`` with class folders; images without classes
are pre-trained on only.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from convnextv2.commands._cli import Parser, positive_int, say
from convnextv2.data import export_digits
from convnextv2.data.digits import DIGITS


def call(name: str, *options: object) -> str:
    """Run a command, showing it and its output; returns its standard output. Ends the demo where it fails."""
    arguments = [str(option) for option in options]
    say(f"\n$ fcmae {name} {shlex.join(arguments)}")
    command = [sys.executable, "-m", "convnextv2", name, *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=surroundings()) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            say(line.rstrip("\n"))
    if process.returncode:
        sys.exit(process.returncode)
    return "".join(lines)


def surroundings() -> dict[str, str]:
    """Environment variables for a command: nothing is imported from the present folder unless this package is there."""
    here = Path(__file__).parents[2] == Path.cwd()
    return dict(os.environ) if here else {**os.environ, "PYTHONSAFEPATH": "1"}


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def digit_samples(out: Path) -> Path:
    """Digits as files in ``samples``; those of an earlier demo are used again, files of anyone else refused."""
    samples = out / "samples"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        made = Path(temporary) / "samples"
        names = {path.relative_to(made) for path in export_digits(made)}
        if not os.path.lexists(samples):
            made.rename(samples)
    if names != {path.relative_to(samples) for path in samples.rglob("*") if not path.is_dir()}:
        raise ValueError(f"{samples}: holds other files than the digits that belong there; choose another `output`")
    return samples


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DIGITS, help="folder of images, or digits (default)")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for everything the demo makes")
    parser.add_argument(
        "--epochs", type=positive_int, help="epochs of pre-training (default: the recipe's; 5 of a folder)"
    )
    parser.add_argument("--finetune-epochs", type=positive_int, help="the same for fine-tuning")
    return parser.parse_args()


def main() -> None:
    """Run the commands one after the other, then print what they showed."""
    args = parse_arguments()

    from convnextv2.data import open_source
    from convnextv2.training.claim import claim

    start = time.monotonic()
    out: Path = args.output
    digits = args.data == DIGITS
    if digits:
        recipe: list[object] = ["--config", "digits"]
        finetune_recipe: list[object] = ["--config", "digits"]
        pretrain_data, classes = DIGITS, True
    else:
        folder = Path(args.data)
        train = folder / "train" if (folder / "train").is_dir() else folder
        classes = len(open_source(train).classes) > 1
        pretrain_data = str(train)
        recipe = ["--config", "small", "--epochs", args.epochs or 5, "--warmup-epochs", 1]
        recipe += ["--img-size", 96]
        finetune_recipe = ["--config", "small", "--epochs", args.finetune_epochs or 3]
        finetune_recipe += ["--warmup-epochs", 1, "--min-steps", 0, "--data", folder]
    if digits and args.epochs:
        recipe += ["--epochs", args.epochs]
    if digits and args.finetune_epochs:
        finetune_recipe += ["--epochs", args.finetune_epochs]

    pretrained, dense, finetuned = out / "pretrain", out / "backbone.safetensors", out / "finetune"
    claim(pretrained, False, True, pretrain_data)
    claim(finetuned, False, True, args.data)
    samples = digit_samples(out) if digits else folder / "val" if (folder / "val").is_dir() else folder
    call("pretrain", *recipe, "--data", pretrain_data, "--output", pretrained, "--overwrite")
    converted = call("convert", pretrained, dense)
    pictures = out / "reconstructions.png"
    call("visualize", pretrained, samples, "--output", pictures)
    if classes:
        call("finetune", *finetune_recipe, "--init", dense, "--output", finetuned, "--overwrite")
        call("predict", finetuned, samples, "--output", out / "results.csv")

    losses = [line["loss"] for line in metrics(pretrained)]
    error = re.search(r"^verified: (.*)$", converted, re.M)
    assert error is not None
    say(f"\nDone in {time.monotonic() - start:.0f} s. What it showed:")
    say(f"  pre-training loss     from {losses[0]:.3f} to {losses[-1]:.3f} ({1 - losses[-1] / losses[0]:.0%} less)")
    say(f"  sparse = dense        {error[1]}")
    if classes:
        best = max(line["val_top1"] for line in metrics(finetuned))
        with (out / "results.csv").open(encoding="utf-8", newline="") as table:
            rows = sum(1 for _ in csv.DictReader(table))
        say(f"  fine-tuned accuracy   {best:.1f} % top-1 on the validation part, from the pre-trained weights")
        say(f"  predictions           {out / 'results.csv'}, {rows} images")
    else:
        say("  fine-tuning           left out: these images have no class folders")
    say("Pictures to look at:")
    found = [pictures, pretrained / "loss.png", *sorted((pretrained / "reconstructions").glob("*.png"))[-1:]]
    for path in [*found, *([finetuned / "confusion_matrix.png"] if classes else [])]:
        say(f"  {path}")

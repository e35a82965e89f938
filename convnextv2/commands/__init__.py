"""The command ``fcmae``: one table of what it can do, from which the module of a command is imported when it is called.

A module has ``main``, which takes its arguments from the process and returns an exit status, or None for 0. Scripts of
the repository call the same functions.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from convnextv2 import __version__
from convnextv2.commands import _cli

COMMANDS = {
    "demo": "the whole path on handwritten digits or your images, in minutes",
    "pretrain": "pre-train with masked images (FCMAE)",
    "visualize": "draw what a pre-trained network makes of masked images",
    "convert": "pre-trained weights as an ordinary dense network's, checked; other formats",
    "finetune": "train a classifier on a folder of classes",
    "predict": "classify images and write a table",
    "evaluate": "how good features or a classifier are: neighbours, linear probe, scores",
    "embed": "features of images in a file, neighbours, outliers, a map",
    "segment": "a class for every pixel: train, predict, evaluate",
    "report": "one page about one or several runs",
    "model-card": "a model card for weights that are passed on",
    "recipes": "list the recipes that --config knows by name, print or copy one",
    "info": "layers, parameters and FLOPs of a network, and what was published",
    "download-weights": "fetch published checkpoints by name, or list them",
    "download-data": "fetch a public set of photographs",
    "check": "look through images before training: damaged, alike, blank, odd",
    "stats": "mean, deviation and histogram of each band of images",
    "shards": "write a folder of images into tar shards",
    "backends": "which kernels there are, and which can run here",
    "completion": "print what completes fcmae in bash or zsh",
    "minkowski": "build and install MinkowskiEngine",
}
"""Names and a line about each, in the order in which they are used."""

EPILOG = """
fcmae NAME --help explains one. In several processes: torchrun --nproc-per-node 8 -m convnextv2 pretrain …
"""


def help_text() -> str:
    """What ``fcmae --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fcmae [--help] [--version] NAME ...",
            "",
            (sys.modules["convnextv2"].__doc__ or ""),
            "",
            *lines,
            EPILOG,
        ]
    )


def load(name: str) -> Callable[[], int | None]:
    """The function of a command; ValueError, which names the nearest, if there is none."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "fcmae --help lists them"
        raise ValueError(f"fcmae has no command {_cli.one_line(name)!r:.60}; {hint}")
    main: Callable[[], int | None] = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").main
    return main


def dispatch(arguments: Sequence[str]) -> int | None:
    """Run what the arguments ask for, and return its exit status."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        _cli.say(help_text().rstrip())
        return 0 if arguments else 2
    if name in ("-V", "--version"):
        _cli.say(f"sparse-fcmae {__version__}")
        return 0
    command = load(name)
    sys.argv = [f"fcmae {name}", *rest]  # parsers take their name from it, and runs record it
    return command()


def main() -> NoReturn:
    """The entry point: :func:`dispatch` on the process's arguments, as :func:`~convnextv2.commands._cli.run` does."""
    _cli.run(lambda: dispatch(sys.argv[1:]))

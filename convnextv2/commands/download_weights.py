"""Download checkpoints by name, to have them where there is no network, or list those that were published.

A name is one of --list, an address, or hf-hub:org/name[@revision]; what is in the cache and whole is not fetched again.
A download that was cut goes on where it stopped. Every option of the other scripts that takes a checkpoint takes these
names, too. Exit status: 0 if all are there, 2 if not. Examples:
  fcmae download-weights --list
  fcmae download-weights convnextv2_atto_1k_224_fcmae convnextv2_base_22k_384_ema
  fcmae download-weights convnextv2_tiny_1k_224_ema --mirror https://mirror.example.org/convnextv2 --output weights
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from convnextv2.commands import _cli
from convnextv2.weights.addresses import SCHEMES, scheme_of, shown

KINDS = {
    "fcmae": "pre-trained, an encoder",
    "1k": "classifier, ImageNet-1K",
    "22k": "classifier, ImageNet-22K, then 1K",
}
HEADINGS = ("name", "what", "pixels", "parameters", "FLOPs", "top-1", "cached")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, list or fetch."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to download")
    parser.add_argument("--list", action="store_true", help="list the published checkpoints, and what is cached")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where to keep files; default: torch's hub cache")
    text = "address that holds the published files; default: CONVNEXTV2_MIRROR, else the authors' server"
    parser.add_argument("--mirror", metavar="URL", help=text)
    options = parser.parse_args(arguments)
    if options.list == bool(options.names):
        parser.error("name what to download, or say --list")
    if options.mirror is not None and scheme_of(options.mirror) not in SCHEMES:
        parser.error(f"--mirror {options.mirror!r}: expected http://, https:// or file://")
    if options.list:
        show(options.output)
        return 0
    check(parser, options)
    there = [one(name, options) for name in dict.fromkeys(options.names)]
    return 0 if all(there) else 2


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse wrong names before anything is fetched."""
    from convnextv2.weights.zoo import get

    for name in options.names:
        if name.startswith("hf-hub:"):
            if options.output is not None:
                parser.error(f"{name}: the hub's files stay in its library's cache (HF_HOME); leave out --output")
        elif scheme_of(name) not in ("http", "https"):
            try:
                get(name)
            except ValueError as error:
                parser.error(str(error))


def one(name: str, options: argparse.Namespace) -> bool:
    """Whether the file of a name is there now; where, or why not, is told."""
    try:
        _cli.say(f"{shown(name)}: {place(name, options)}")
    except (ValueError, OSError) as error:
        _cli.warn(f"error: {_cli.describe(error)}")
        return False
    return True


def place(name: str, options: argparse.Namespace) -> Path:
    """The file of a name, fetched; raises as :func:`~convnextv2.weights.names.resolve_path`."""
    from convnextv2.weights.names import fetch_address, resolve_path
    from convnextv2.weights.zoo import PUBLISHED, fetch

    if name in PUBLISHED:
        return fetch(name, folder=options.output, mirror=options.mirror)
    if scheme_of(name):
        return fetch_address(name, options.output)
    return resolve_path(name)


def held(file: Path) -> str:
    """How much of a file is there, in words."""
    partial = file.with_name(f"{file.name}.partial")
    found = next((path for path in (file, partial) if path.is_file()), None)
    size = "–" if found is None else f"{found.stat().st_size / 2**20:,.0f} MiB"
    return f"{size} of it" if found == partial else size


def show(folder: Path | None) -> None:
    """The table of what was published."""
    from convnextv2.weights.zoo import LICENCE, PUBLISHED, place_of

    rows = [HEADINGS]
    for name, file in PUBLISHED.items():
        flops = "–" if file.flops is None else f"{file.flops:g} G"
        top1 = "–" if file.top1 is None else f"{file.top1:.1f} %"
        numbers = str(file.resolution), f"{file.parameters:g} M", flops, top1
        rows.append((name, KINDS[file.kind], *numbers, held(place_of(name, folder))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:{'<' if column < 2 else '>'}{widths[column]}}" for column, cell in enumerate(row))
        _cli.say("  ".join(cells))
    _cli.say("parameters of the classifier, multiply-adds an image and accuracy on ImageNet-1K are those published")
    _cli.say(f"licence: {LICENCE}, not for commercial use; cache: {place_of(next(iter(PUBLISHED)), folder).parent}")

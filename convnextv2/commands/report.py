"""Write one page about one or several runs: curves, pictures, recipes and what differs, environment, commands.

The page is a single HTML file that fetches nothing: it can be mailed, archived, and opened without a network. A run may
be at work still, or have been stopped: what is missing or damaged is told, there and here. Examples:
  fcmae report runs/pretrain
  fcmae report runs/* --output comparison.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from convnextv2.commands import _cli
from convnextv2.data.names import shown
from convnextv2.messages import one_line
from convnextv2.outputs import check_output, is_stream, output_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, look, write."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders of fcmae pretrain and fcmae finetune"
    )
    _cli.add_output(parser, "report.html", "HTML file to write, - for standard output")
    options = parser.parse_args(arguments)

    from convnextv2.report import REPORT, report

    check_output(options.output, REPORT, inputs=options.runs, overwrite=options.overwrite)
    runs, others = chosen(options.runs)
    text, notices = report(runs)
    notices = [*(f"{one_line(shown(str(path)))}: left out: holds no run" for path in others), *notices]
    with output_text(options.output) as file:
        file.write(text)
    for notice in notices:
        _cli.warn(f"notice: {notice}")
    told = f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {len(text.encode(errors='replace')) / 1e6:.1f} MB"
    (_cli.warn if is_stream(options.output) else _cli.say)(f"report of {told}: {options.output}")


def chosen(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The runs among what is given, each once, as a pattern such as runs/* gives it; and the others.

    Raises:
        FileNotFoundError: if something is not there.
        ValueError: if there is no run at all.
    """
    from convnextv2.report.runs import is_run

    found: dict[Path, Path] = {}
    others = []
    for path in paths:
        path.stat()
        if path.is_dir() and is_run(path):
            found.setdefault(path.resolve(), path)
        else:
            others.append(path)
    if not found:
        raise ValueError(
            f"{one_line(shown(str(paths[0])))}: holds no run; name the folder that was the --output of fcmae pretrain "
            "or fcmae finetune"
        )
    return list(found.values()), others

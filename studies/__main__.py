"""Run declared experiments, and tell what they came to: see docs/studies.md.

python -m studies run digits --scale smoke
python -m studies status flowers --scale laptop --data FOLDER
python -m studies table flowers --scale laptop --data FOLDER --save studies/results/flowers-laptop.json
python -m studies table --markdown docs/results.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from convnextv2.files import atomic_path, write_json
from convnextv2.messages import one_line
from convnextv2.training import RunStoppedError
from studies import runner, tables
from studies.declaration import Study, read_study
from studies.parts import FREE, Part


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 where a part failed, 2 where something is wrong, told in one line."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.command(args))
    except RunStoppedError as stopped:
        reason, status = str(stopped), stopped.status
    except KeyboardInterrupt:
        reason, status = "interrupted", 130
    except (ValueError, TypeError, OSError) as error:
        reason, status = f"error: {one_line(error)}", 2
    print(reason, file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m studies", description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(required=True, metavar="run|status|table")
    run = commands.add_parser("run", help="do what is not done yet")
    status = commands.add_parser("status", help="what is done, and how long the rest will take")
    table = commands.add_parser("table", help="tables, plots and pictures of what is done")
    for sub, command in ((run, _run), (status, _status), (table, _table)):
        sub.set_defaults(command=command)
        sub.add_argument("study", nargs="?" if sub is table else None, help="name of a study, or its file")
        sub.add_argument("--scale", default="full", help="one that the study declares; by default as it stands")
        sub.add_argument("--data", help="the images, in place of those that the study names")
        sub.add_argument("--output", type=Path, default=Path("runs/studies"), help="folder for all studies")
        sub.add_argument(
            "--known",
            type=Path,
            nargs="+",
            default=[],
            metavar="FILE",
            help="numbers of it, as --save wrote, count as done",
        )
    run.add_argument("--threads", type=int, help="of the processor; torch's choice by default")
    run.add_argument("--free", nargs="+", default=[], metavar="NAME=VALUE", help=f"any of {', '.join(FREE)}")
    table.add_argument("--save", type=Path, help="file to write the numbers to as well, for studies/results")
    table.add_argument("--markdown", type=Path, help="document whose tables are made anew from the files it names")
    return parser


def _study(args: argparse.Namespace) -> tuple[Study, Path, dict[str, Any]]:
    """The study, the folder of its parts, which all scales share, and the numbers that are known from elsewhere."""
    study = read_study(args.study, args.scale, args.data)
    known = tables.known_numbers(args.known, study)
    data = Path(study.cells[0].part.data).resolve()
    if data.is_dir() and args.output.resolve().is_relative_to(data):
        raise ValueError(f"--output {args.output} lies in the images, where pictures of runs would be among them")
    return study, args.output / study.name, known


def _open_parts(args: argparse.Namespace) -> tuple[Study, list[Part], Path]:
    """The study, the parts that nothing is known of from elsewhere, and its folder."""
    study, folder, known = _study(args)
    there = {row["part"] for row in known["numbers"]}
    return study, replace(study, cells=tuple(c for c in study.cells if c.part.key not in there)).parts, folder


def _run(args: argparse.Namespace) -> int:
    free: dict[str, Any] = {}
    for text in args.free:
        name, _, value = text.partition("=")
        if name not in FREE:
            raise ValueError(f"--free takes {', '.join(FREE)}, which leave the numbers as they are, got {text}")
        free[name] = yaml.safe_load(value)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    study, parts, folder = _open_parts(args)
    for part in parts:
        part.options(folder, **free)  # wrong ones are told before anything runs
    print(f"{study.name}, scale {study.scale}: {len(parts)} parts, in {folder}", flush=True)
    failed = runner.run(parts, folder, lambda line: print(line, flush=True), study.probes, **free)
    print(f"{len(parts) - failed} of {len(parts)} parts are done")
    return 1 if failed else 0


def _status(args: argparse.Namespace) -> int:
    _, parts, folder = _open_parts(args)
    print("\n".join(runner.status(parts, folder)))
    return 0


def _table(args: argparse.Namespace) -> int:
    if args.markdown is not None:
        text = tables.render(args.markdown.read_text(encoding="utf-8"), Path(__file__).parents[1])
        with atomic_path(args.markdown) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return 0
    if args.study is None:
        raise ValueError("name a study, or a document with --markdown")
    study, folder, known = _study(args)
    found = tables.collect(study, folder, known)
    if not found["numbers"]:
        raise ValueError(f"{folder}: nothing is done there yet")
    made = folder / study.scale
    for path in (made / "results.json", *([args.save] if args.save else [])):
        write_json(path, found)
    text = tables.document(found)
    (made / "tables.md").write_text(text, encoding="utf-8")
    tables.draw(found, made / "plots")
    tables.copy_reconstructions(study, folder, made / "plots")
    print(f"{text}\nThe numbers, these tables and plots are in {made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

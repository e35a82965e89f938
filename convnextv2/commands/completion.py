"""Print what completes ``fcmae`` in a shell: its commands, their options, and what these can be set to.

Needs shtab (pip install 'sparse-fcmae[completion]'). Write it anew after an update. Examples:
  fcmae completion bash > ~/.local/share/bash-completion/completions/fcmae
  fcmae completion zsh > ~/.zfunc/_fcmae      # a folder of fpath
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from convnextv2 import commands
from convnextv2.commands import _cli
from convnextv2.outputs import output_path

SHELLS = ("bash", "zsh")
WITHIN = {"segment": ("train", "predict", "evaluate")}
"""Commands that have commands of their own."""
PLACES = ("config", "data", "output", "init", "cache", "probe")
"""Options of runs that are files and folders, or names."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, gather the parsers, print."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=SHELLS, help="for which it is")
    options = parser.parse_args(arguments)
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ValueError("completion needs shtab: pip install 'sparse-fcmae[completion]'") from error
    _cli.say(shtab.complete(whole(), options.shell).rstrip())


def whole() -> argparse.ArgumentParser:
    """A parser of ``fcmae`` with those of all commands below it."""
    root = argparse.ArgumentParser("fcmae")
    root.add_argument("--version", action="store_true", help="say which it is")
    below(root, {name: of_command(name) for name in commands.COMMANDS})
    return root


def of_command(name: str) -> argparse.ArgumentParser:
    """The parser of a command, with those below it."""
    if name in WITHIN:
        parser = argparse.ArgumentParser(f"fcmae {name}")
        below(parser, {one: with_values(parser_of(name, one)) for one in WITHIN[name]})
    else:
        parser = with_values(parser_of(name))
    parser.description = commands.COMMANDS[name]  # one line, for zsh
    return parser


def below(parser: argparse.ArgumentParser, made: Mapping[str, argparse.ArgumentParser]) -> None:
    """Put parsers that there are below another one."""
    by_prog = {f"{parser.prog} {name}": one for name, one in made.items()}
    take: Any = lambda prog, **_: by_prog[prog]  # noqa: E731  # in place of a class
    subparsers = parser.add_subparsers(prog=parser.prog, parser_class=take)
    for name, one in made.items():
        subparsers.add_parser(name, help=one.description)


class _Found(BaseException):
    """Carries a parser out of the command that made it, past whatever that catches."""


def parser_of(*command: str) -> argparse.ArgumentParser:
    """The parser of a command, taken where it would print its help: commands make theirs when they are called."""

    def found(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise _Found(parser)

    helping: Any = argparse.ArgumentParser
    argv, print_help = sys.argv, helping.print_help
    helping.print_help = found
    try:
        commands.dispatch([*command, "--help"])
    except _Found as carried:
        parser: argparse.ArgumentParser = carried.args[0]
        return parser
    finally:
        sys.argv, helping.print_help = argv, print_help
    raise AssertionError(f"{' '.join(command)} has no help")


def with_values(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, whose options say what completes them: files, or what jsonargparse keeps as a type."""
    import shtab

    from convnextv2.segmentation import SegmentOptions
    from convnextv2.training import FinetuneOptions, PretrainOptions

    kinds = PretrainOptions, FinetuneOptions, SegmentOptions
    choices = {item.name: item.metadata["choices"] for kind in kinds for item in fields(kind)}
    for action in parser._actions:
        if action.choices is not None:
            action.choices = list(action.choices)  # shtab takes those of a dictionary for commands
        elif action.nargs == 0:
            continue
        elif action.type in (Path, output_path, _cli.checkpoint) or action.dest in PLACES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.option_strings:
            action.choices = choices.get(action.dest)
    return parser

"""Options of a run as a frozen dataclass whose fields carry their help, read from command line and recipe.

Precedence: command line, then the recipe of ``--config``, then, where a run is resumed, its own ``config.yaml``, then
the defaults.
"""

from __future__ import annotations

import argparse
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from convnextv2.recipes import find_recipe
from convnextv2.training.components import COMPONENTS, OTHER, by_component, component_of, plain_flags
from convnextv2.training.recipe_files import read_recipes, split_arguments, why_refused, write_yaml

T = TypeVar("T")
NOT_IN_RECIPE = ("resume", "overwrite")


def option(default: Any, help: str, choices: Sequence[Any] | None = None) -> Any:
    """A dataclass field with the help text that ``--help`` shows; ``choices`` closes the set of values."""
    return field(default=default, metadata={"help": help, "choices": choices})


class ImageSize:
    """(height, width) in pixels from ``224``, ``192x256``, ``192,256`` or ``[192, 256]``; else ValueError."""

    def __call__(self, value: Any) -> tuple[int, int]:
        parts = list(value) if isinstance(value, list | tuple) else re.split("[x×,]", str(value).lower())
        try:
            sides = [int(str(part)) for part in parts]
        except ValueError:
            sides = []
        if len(sides) not in (1, 2) or min(sides) < 1:
            raise ValueError(f"{value!r} is not a size in pixels; write 224, or HEIGHTxWIDTH as in 192x256")
        return sides[0], sides[-1]

    def __repr__(self) -> str:
        return "size"  # --help prints it


image_size = ImageSize()


def parse_options(cls: type[T], argv: Sequence[str] | None, description: str = "", prog: str = "") -> T:
    """Options of the dataclass ``cls`` from the command line.

    Args:
        cls: of :class:`~convnextv2.training.options.RunOptions`, with fields made by :func:`option`.
        argv: arguments; None takes those of the process.
        description: head of ``--help``.
        prog: name of the program in it; that of the process if left out.

    Raises:
        ValueError: on an unknown or ill-typed option or recipe key.
        OSError: if a recipe cannot be read.
        SystemExit: after ``--help`` and ``--print-config``.
    """
    parser, names = _parser(cls, description, prog), [f.name for f in fields(cls)]  # type: ignore[arg-type]
    try:
        given, rest = split_arguments(argv)
        recipes = [find_recipe(path, getattr(cls, "task", "")) for path in given.config]
        arguments = plain_flags(rest, parser._option_string_actions)
        values = parser.parse_args(arguments, namespace=read_recipes(parser, recipes, names))
        own = Path(values.output or "") / "config.yaml"
        if values.output and own.is_file() and _resumes(values.resume, own.parent):
            values = parser.parse_args(arguments, namespace=read_recipes(parser, [own, *recipes], names))
    except (argparse.ArgumentError, OverflowError) as error:
        raise ValueError(why_refused(error)) from error
    options = cls(**{name: values[name] for name in names})
    if given.print_config:
        sys.stdout.write(recipe_text(options, nested=True))
        raise SystemExit(0)
    return options


def _resumes(resume: Any, run: Path) -> bool:
    from convnextv2.training.states import find_state  # with torch: not for --help

    return resume is True or bool(resume and find_state(run))


def recipe_text(options: Any, nested: bool = False) -> str:
    """Resolved options as a recipe that ``--config`` reads back; ``nested``: each below its component."""
    values = {key: value for key, value in asdict(options).items() if key not in NOT_IN_RECIPE}
    return write_yaml(by_component(values) if nested else values)


def _parser(cls: type, description: str, prog: str) -> Any:
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(prog=prog or Path(sys.argv[0]).name, description=description, exit_on_error=False)
    parser.add_argument(
        "--config", nargs="+", metavar="RECIPE", help="YAML files, or names (fcmae recipes lists them); later ones win"
    )
    parser.add_argument("--print-config", action="store_true", help="print the options as a recipe, and end")
    groups = {name: parser.add_argument_group(name) for name in (*COMPONENTS, OTHER)}
    hints = get_type_hints(cls)
    for item in fields(cls):
        flag, kind = f"--{item.name.replace('_', '-')}", hints[item.name]
        group = groups[component_of(item.name)]
        if get_origin(kind) in (Union, types.UnionType):
            kind = get_args(kind)[0]  # the others are for Python: a path, one number for a square, None
        default = list(item.default) if isinstance(item.default, tuple) else item.default  # as it is parsed
        extra: dict[str, Any] = {"default": default, "help": item.metadata["help"]}
        if kind is bool and item.metadata["choices"]:
            extra |= {"type": bool | Literal[tuple(item.metadata["choices"])], "nargs": "?", "const": True}
            no: dict[str, Any] = {"action": "store_const", "const": False, "default": False, "help": "the opposite"}
            group.add_argument(f"--no-{flag[2:]}", dest=item.name, **no)
        elif kind is bool:
            extra["action"] = ActionYesNo(yes_prefix="", no_prefix="no-")
        elif item.name in ("img_size", "window"):
            extra |= {"type": image_size, "metavar": "SIZE", "default": item.default}
        elif get_origin(kind) is tuple:
            extra |= {"type": get_args(kind)[0], "nargs": len(get_args(kind)), "metavar": "N"}
        elif item.metadata["choices"]:
            extra["type"] = Literal[tuple(item.metadata["choices"])]
        else:
            extra |= {"type": kind, "metavar": kind.__name__.upper()}
        group.add_argument(flag, **extra)
    return parser

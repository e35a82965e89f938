"""Options of a run as a frozen dataclass whose fields carry their help, read from command line and recipe.

Precedence: command line, then the recipe of ``--config``, then, where a run is resumed, its own ``config.yaml``, then
the defaults.
"""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Sequence
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from convnextv2.messages import one_line
from convnextv2.training.saved_state import find_state

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


def parse_options(cls: type[T], argv: Sequence[str] | None, description: str = "") -> T:
    """Options of the dataclass ``cls`` from the command line.

    Args:
        cls: of :class:`~convnextv2.training.options.RunOptions`, with fields made by :func:`option`.
        argv: arguments; None takes those of the process.
        description: head of ``--help``.

    Raises:
        ValueError: on an unknown or ill-typed option or recipe key.
        OSError: if a recipe cannot be read.
        SystemExit: after ``--help``.
    """
    recipes = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    recipes.add_argument("--config", action="append", default=[], type=Path)
    parser = _parser(cls, description)
    try:
        given, rest = recipes.parse_known_args(argv)
        for path in given.config:
            _check_recipe(path)
        # What is parsed later wins, and the command line is to win.
        arguments = [*(f"--config={path}" for path in given.config), *rest]
        values = parser.parse_args(arguments)
        own = Path(values.output or "") / "config.yaml"
        if values.output and own.is_file() and (values.resume is True or (values.resume and find_state(own.parent))):
            _check_recipe(own)
            values = parser.parse_args([f"--config={own}", *arguments])
    except (argparse.ArgumentError, OverflowError) as error:
        raise ValueError(one_line(error)) from error
    return cls(**{f.name: values[f.name] for f in fields(cls)})  # type: ignore[arg-type]


def recipe_text(options: Any) -> str:
    """Resolved options as a recipe that ``--config`` reads back."""
    values = {key: _plain(value) for key, value in asdict(options).items() if key not in NOT_IN_RECIPE}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _check_recipe(path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a recipe, lines of 'option: value', got {type(content).__name__}")
    other = content.get("config", "")
    if not isinstance(other, str) or re.fullmatch(r"[-+.\d]+e[-+]?\d+", other, re.I):  # a number to jsonargparse
        raise ValueError(f"{path}: config should name another recipe, got {one_line(other)}")
    for key, value in content.items():  # a few lines of lists of aliases of lists become gigabytes
        if any(isinstance(item, list | dict | set) for item in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{path}: {one_line(key)} should be a value or a list of values")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _parser(cls: type, description: str) -> Any:
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML recipe: option names with underscores, and values")
    hints = get_type_hints(cls)
    for item in fields(cls):
        flag, kind = f"--{item.name.replace('_', '-')}", hints[item.name]
        if get_origin(kind) in (Union, types.UnionType):
            kind = get_args(kind)[0]  # the others are for Python: a path, one number for a square, None
        extra: dict[str, Any] = {"default": _plain(item.default), "help": item.metadata["help"]}
        if kind is bool and item.metadata["choices"]:
            extra |= {"type": bool | Literal[tuple(item.metadata["choices"])], "nargs": "?", "const": True}
            no: dict[str, Any] = {"action": "store_const", "const": False, "default": False, "help": "the opposite"}
            parser.add_argument(f"--no-{flag[2:]}", dest=item.name, **no)
        elif kind is bool:
            extra["action"] = ActionYesNo(yes_prefix="", no_prefix="no-")
        elif item.name == "img_size":
            extra |= {"type": image_size, "metavar": "SIZE", "default": item.default}
        elif get_origin(kind) is tuple:
            extra |= {"type": get_args(kind)[0], "nargs": len(get_args(kind)), "metavar": "N"}
        elif item.metadata["choices"]:
            extra["type"] = Literal[tuple(item.metadata["choices"])]
        else:
            extra |= {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(flag, **extra)
    return parser

"""What a recipe file says: options by themselves or below their component, and files that it builds on.

``lr: 1e-3`` and ``optimizer: {lr: 1e-3}`` are the same; a name that is unknown, or below another component than its
own, is refused with the right one named.
"""

from __future__ import annotations

import re
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from convnextv2.messages import one_line
from convnextv2.recipes import find_recipe
from convnextv2.training.components import COMPONENTS, OTHER, component_of, unknown


def split_arguments(arguments: Sequence[str] | None) -> tuple[Namespace, list[str]]:
    """``config``, the recipes that a command line names, and ``print_config``; and its other arguments."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="extend", nargs="+", default=[])
    parser.add_argument("--print-config", action="store_true")
    return parser.parse_known_args(arguments)


def read_recipes(parser: Any, paths: Sequence[Path], known: Collection[str]) -> Any:
    """jsonargparse's namespace of the options of recipes, later over earlier ones; raises as :func:`read_recipe`."""
    merged: dict[str, Any] = {}
    for path in paths:
        for name, value in read_recipe(path, known).items():
            try:
                parser.parse_object({name: value}, defaults=False)
            except (ArgumentError, ValueError, OverflowError) as error:
                reason = why_refused(error).removeprefix(f"--{name.replace('_', '-')}: ")
                if "is not iterable" in reason:
                    reason = f"expected a list of values, got {one_line(value)}"
                raise ValueError(f"{path}: {name}: {reason}") from error
            merged[name] = value
    return parser.parse_object(merged)


def why_refused(error: Exception) -> str:
    """An error of jsonargparse in one line, with the flag in place of its parser's key."""
    key = r"Parser key \"(\w+)\"(?: element \d+)?:"
    text = re.sub(key, lambda found: f"--{found[1].replace('_', '-')}:", one_line(error))
    return re.sub(r"typing\.|<class '(\w+)'>", r"\1", text)


def read_recipe(path: Path, known: Collection[str] | None = None, above: Sequence[Path] = ()) -> dict[str, Any]:
    """Options of a recipe, by themselves, of the files that it builds on too; later ones win.

    Args:
        path: a YAML file; ``config`` in it names a file, or several, from its own folder, or recipes of the package.
        known: options that there are; None for any.
        above: recipes that this one is read for.

    Raises:
        ValueError: in one line that begins with the file, if it is no recipe of these options.
        OSError: if a file cannot be read.
    """
    if any(path.resolve() == other.resolve() for other in above):
        raise ValueError(f"{path}: config goes in a circle: {' -> '.join(map(str, (*above, path)))}")
    found: dict[str, Any] = {}
    own: set[str] = set()
    for key, value in _content(path).items():
        if key == "config":
            for other in value if isinstance(value, list) else [value]:
                if not isinstance(other, str) or not other.strip():
                    raise ValueError(f"{path}: config should name another recipe, got {one_line(other)}")
                try:
                    base = find_recipe(other, folder=path.parent)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
                found |= read_recipe(base, known, (*above, path))
            continue
        for name, option in _options(path, key, value, known):
            if name in own:
                raise ValueError(f"{path}: {name} is given twice")
            own.add(name)
            found[name] = option
    return found


class _Dumper(yaml.SafeDumper):
    """Quotes what jsonargparse takes for a number, and the YAML of PyYAML for text: 1e3."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[\d_]+e[-+]?\d+$", re.I), [*"-+0123456789"])


def write_yaml(values: Mapping[str, Any]) -> str:
    """Values as :func:`read_recipe` reads them back."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _content(path: Path) -> dict[Any, Any]:
    from jsonargparse import get_loader

    try:
        text = path.read_text(encoding="utf-8-sig")
        content = yaml.safe_load(text)  # first: nothing bounds the depth to which the other one's C goes
        if isinstance(content, dict) and any(value is not None for value in content.values()):
            content = get_loader("yaml")(text)  # knows numbers as 1e-3, but takes 'key:' by itself for text
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a recipe, lines of 'option: value', got {type(content).__name__}")
    return content


def _options(path: Path, key: Any, value: Any, known: Collection[str] | None) -> Iterator[tuple[str, Any]]:
    """Option and value of a line, or of the lines of a component."""
    if key not in COMPONENTS and key != OTHER:
        yield _option(path, key, value, known)
    elif isinstance(value, dict) or (value is None and key not in (known or ())):
        for name, option in (value or {}).items():
            if name in (known or ()) and component_of(name) != key:
                raise ValueError(f"{path}: {name} belongs to {component_of(name)}, not to {key}")
            yield _option(path, name, option, known)
    elif known is None or key in known:  # the option of that name
        yield _option(path, key, value, known)
    else:
        example = COMPONENTS.get(key, ("option",))[0]
        raise ValueError(f"{path}: {key} should hold options, as in '{key}: {{{example}: …}}'")


def _option(path: Path, name: Any, value: Any, known: Collection[str] | None) -> tuple[str, Any]:
    if known is not None and (not isinstance(name, str) or name not in known):
        raise ValueError(f"{path}: {unknown(str(name), known)}")
    # a few lines of lists of aliases of lists become gigabytes
    if any(isinstance(item, list | dict | set) for item in (value if isinstance(value, list) else [value])):
        raise ValueError(f"{path}: {name} should be a value or a list of values")
    return name, value

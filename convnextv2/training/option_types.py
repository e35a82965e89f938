"""Whether options are of the types that their fields say: a command line parses them, Python takes anything."""

from __future__ import annotations

import os
import re
import types
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from convnextv2.training.recipe import image_size


def plain_value(name: str, value: Any) -> Any:
    """An option as a recipe holds it: numbers of numpy as Python's, paths as text, lists as tuples, a size as two.

    Raises:
        ValueError: if it is a size, and none in pixels.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if name in ("img_size", "window") and value is not None:
        try:
            return image_size(value)
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from error
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return tuple(value) if isinstance(value, list) else value


def check_types(options: Any) -> None:
    """Raise TypeError where an option is not of the type that its field says; kinds beyond plain values may be any."""
    hints = get_type_hints(type(options))
    for item in fields(options):
        value, kind = getattr(options, item.name), hints[item.name]
        if not _is(value, kind):
            names = re.sub(r"pathlib\.(\w+\.)*|typing\.|<class '(\w+)'>", r"\2", str(kind))
            raise TypeError(f"`{item.name}` must be {names.replace(' | ', ' or ')}, got {value!r:.60}")


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, types.UnionType):
        return any(_is(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is, value, kinds))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return not isinstance(kind, type) or isinstance(value, (int, float) if kind is float else kind)

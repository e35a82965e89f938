"""What a package offers, imported when it is asked for (PEP 562): ``fcmae --help`` then needs no torch.

The same names stand in the package's ``__init__.pyi``, for type checkers and editors.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def deferred(
    package: str, offered: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package; its submodules are attributes, too.

    Args:
        package: its ``__name__``.
        offered: submodules to the names in them, with spaces between, that are the package's.
    """
    origins = {name: module for module, names in offered.items() for name in names.split()}

    def get(name: str) -> Any:
        if name in origins:
            value = getattr(importlib.import_module(f"{package}.{origins[name]}"), name)
            setattr(sys.modules[package], name, value)
            return value
        module = f"{package}.{name}"
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted({*vars(sys.modules[package]), *origins}), list(origins)


def later(module: str, name: str) -> Callable[..., Any]:
    """The function of that name, whose module is imported at the first call."""

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments, **options)

    return call

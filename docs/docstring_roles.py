"""References of docstrings as the site shows them: :class:`~package.Name` becomes `Name`."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([\w.]+)`")


def plain(found: re.Match[str]) -> str:
    """A role as a name in code."""
    return f"`{found[2].rpartition('.')[2] if found[1] else found[2]}`"


class Roles(griffe.Extension):
    """Turns Sphinx's roles, which tools for Python know, into code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Of every docstring that is read."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(plain, obj.docstring.value)

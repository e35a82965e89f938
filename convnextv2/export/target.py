"""What a format is that the converter offers beside the layouts of weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convnextv2.export.refusal import ExportError

if TYPE_CHECKING:
    from convnextv2.export.source import Run, Source


@dataclass(frozen=True, kw_only=True)
class Target:
    """A format that the converter offers beside the layouts of weights.

    Args:
        name: as ``--to`` has it.
        about: in one line, for the converter's help.
        layout: the layout of weights that it holds, or that its network is built from.
        suffixes: of its files; empty for a folder.
        packages: what has to be installed, by the names that pip and Python know.
        write: writes a network to a path that is to be made, or to an empty folder, and returns what runs it from
            there. ExportError if the format cannot hold it.
        is_one: whether an existing path is an earlier result.
        loading: lines that tell how the result at a path is used.
    """

    name: str
    about: str
    layout: str
    suffixes: tuple[str, ...]
    packages: tuple[str, ...] = ()
    write: Callable[[Source, Path], Run]
    is_one: Callable[[Path], bool]
    loading: Callable[[Source, str], list[str]]

    def check_packages(self) -> None:
        """Raise ExportError unless all that the format needs is installed."""
        if missing := [name for name in self.packages if importlib.util.find_spec(name) is None]:
            raise ExportError(
                f"the target {self.name} needs {' and '.join(missing)}; install with: pip install {' '.join(missing)}"
            )

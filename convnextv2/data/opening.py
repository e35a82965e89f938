"""The one way in: from what the user names to an :class:`OpenedSource`.

A kind of source is an object in a module of this package, under the name ``SOURCE_KIND``; nothing else names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any, Protocol

from convnextv2.data.decoding import USUAL, Size, Wanted
from convnextv2.data.folders import FolderKind
from convnextv2.data.reading import settled_source
from convnextv2.data.sources import DataError, OpenedSource


class SourceKind(Protocol):
    """A way to name images, such as a folder.

    ``expects`` is what it takes, in words for messages. What a kind needs beyond numpy and Pillow it imports where it
    is used.
    """

    expects: str

    def claims(self, spec: str) -> bool:
        """Whether ``spec`` names such a source. Cheap: called for every kind."""

    def open(self, spec: str, *, in_chans: int, img_size: Size, labelled: bool, wanted: Wanted) -> OpenedSource:
        """What ``spec`` names; arguments, of which ``wanted`` may be left out, and errors as :func:`open_source`."""


_registered: list[SourceKind] = []


def register_kind(kind: SourceKind) -> None:
    """Let ``kind`` be asked, before all others, in this process: for kinds outside of this package."""
    _registered.insert(0, kind)


def source_kinds() -> list[SourceKind]:
    """All kinds in the order in which they are asked. The folder is last: other kinds may be folders, too."""
    package = importlib.import_module("convnextv2.data")
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    found = [module.SOURCE_KIND for module in modules if hasattr(module, "SOURCE_KIND")]
    return [*_registered, *sorted(found, key=lambda kind: isinstance(kind, FolderKind))]


def why_unknown(spec: str | Path) -> str | None:
    """What is wrong with a ``spec`` that no kind claims; None if one does."""
    kinds = source_kinds()
    if any(kind.claims(str(spec)) for kind in kinds):
        return None
    problem = "not a folder" if Path(spec).exists() else "no such folder"
    return f"{spec}: {problem}; expected {' or '.join(kind.expects for kind in reversed(kinds))}"


def open_source(
    spec: str | Path, *, in_chans: int = 3, img_size: Size = (224, 224), labelled: bool = False, wanted: Wanted = USUAL
) -> OpenedSource:
    """Open what the user named.

    Args:
        spec: a folder of images, ``digits``, or what another kind takes.
        in_chans: channels that the images must provide.
        img_size: (H, W) in pixels that they will be cropped to, for sources without a size of their own.
        labelled: insist on labels, and open the validation part where the source has one of its own. Without, only
            what pre-training sees is opened, and labels are given where they are known.
        wanted: what else is wanted of image files.

    Raises:
        DataError: if no kind claims ``spec``, or it holds no usable image.
        ValueError: if more is wanted than its kind can be told.
    """
    for kind in source_kinds():
        if kind.claims(str(spec)):
            options: dict[str, Any] = {"in_chans": in_chans, "img_size": img_size, "labelled": labelled}
            opened = kind.open(str(spec), **(options | wanted.taken_by(kind.open)))
            return settled_source(opened, wanted)
    raise DataError(why_unknown(spec))

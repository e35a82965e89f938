"""What images and their folders are called, in messages and in results."""

from __future__ import annotations

import os
from typing import Any

from convnextv2.messages import one_line


def shown(name: str) -> str:
    """The name of a file as text that can be written: bytes in it that are no UTF-8 become ``\\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def name_of(source: Any, index: int) -> str:
    """What an image of a :class:`~.sources.Source` is called; one line."""
    if hasattr(source, "numbers"):  # of a part of another source
        return name_of(source.source, source.numbers[index])
    if hasattr(source, "paths"):
        return one_line(source.paths[index])
    return one_line(source.name(index) if hasattr(source, "name") else f"image {index}")

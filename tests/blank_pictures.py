"""Figures are made and not rendered, which would be two thirds of a tiny run: see the marker ``pictures``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

render = Figure.savefig


def blank(figure: Figure, path: Path, *, metadata: Mapping[str, str] | None = None, **_: object) -> None:
    """Write a white PNG image of a figure's size, with its marks."""
    marks = PngInfo()
    for name, value in (metadata or {}).items():
        marks.add_text(name, value)
    width, height = (round(side * figure.dpi) for side in figure.get_size_inches())
    Image.new("RGB", (width, height), "white").save(path, "PNG", pnginfo=marks)

"""Pictures of features: a map of all images, and rows of images with those that are alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from convnextv2.evaluation.features import Features
from convnextv2.evaluation.projection import Projection
from convnextv2.training.neighbours import Cell, magnification, save_rows
from convnextv2.training.pictures import picture

COLOURED = 20
"""Classes that are told apart by colour, the most frequent ones; the others are gray."""
SIDE = 144
"""Pixels of the longer side of an image in a row, unless it has less than half of them."""
LETTER = 6.4
"""Pixels of a letter of a title, about."""
RIGHT, WRONG = "#1a7f37", "#b42318"
"""Colours of titles of images of the same class, and of another one."""


def save_map(path: str | os.PathLike[str], made: Projection, features: Features, title: str) -> None:
    """Images as points, coloured by their class; OSError if the file cannot be written."""
    counts = features.labels[features.labels >= 0].bincount(minlength=len(features.classes))
    shown = sorted(counts.argsort(descending=True, stable=True)[:COLOURED].tolist())
    size = min(30.0, max(2.0, 9000 / max(1, len(features))))
    with picture(path, 9, 6.5, "constrained") as figure:
        import matplotlib as mpl

        colours = mpl.colormaps["tab10" if len(shown) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
        axes = figure.subplots()
        style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.75, "rasterized": True}
        other = ~torch.isin(features.labels, torch.tensor(shown, dtype=torch.int64))
        if other.any():
            name = "no class" if not shown else f"{len(features.classes) - len(shown)} others, or none"
            axes.scatter(*made.points[other.numpy()].T, color="0.6" if shown else "C0", label=name, **style)
        for colour, number in zip(colours, shown, strict=False):
            chosen = (features.labels == number).numpy()
            if chosen.any():
                name = f"{short(features.classes[number], 24)} ({int(chosen.sum())})"
                axes.scatter(*made.points[chosen].T, color=colour, label=name, **style)
        axes.set_title(title, size=10, parse_math=False)
        axes.set_xlabel(made.axes[0])
        axes.set_ylabel(made.axes[1])
        axes.grid(alpha=0.25)
        if shown:
            legend = figure.legend(
                loc="outside right upper", frameon=False, fontsize=9, markerscale=max(1, 5 / size**0.5)
            )
            for text in legend.get_texts():
                text.set_parse_math(False)
            for handle in legend.legend_handles:
                handle.set_alpha(1.0)  # type: ignore[union-attr]


def short(text: str, letters: int) -> str:
    """The end of a long name, which tells files apart."""
    return text if len(text) <= letters else f"…{text[1 - letters :]}"


def save_alike(
    path: str | os.PathLike[str],
    features: Features,
    queries: Sequence[int],
    found: tuple[Tensor, Tensor],
    image: Callable[[int], Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    before: Sequence[str] = (),
) -> None:
    """A row for each of some images: itself under its name, then those nearest to it, with cosine similarity and class,
    green where that is its own.

    Args:
        queries: numbers of the images, in the order of ``features``.
        found: similarities and numbers ``[N, k]`` of all images.
        image: gives image ``[C, H, W]`` of a number, normalised with ``mean`` and ``std``; called for what is drawn.
        before: what is said before the name of each.

    Raises OSError if the file cannot be written.
    """
    rows = []
    for query, said in zip(queries, before or [""] * len(queries), strict=True):
        first = fitted(image(query))
        letters = int(first.shape[2] * magnification(first.shape[2]) / LETTER)
        row = [Cell(first, said + short(features.files[query].stem, max(4, letters - len(said))))]
        own = int(features.labels[query])
        for value, number in zip(*(part[query].tolist() for part in found), strict=True):
            label, title = int(features.labels[number]), f"{value:.3f}"
            title += f" {short(features.classes[label], max(4, letters - 6))}" if label >= 0 else ""
            colour = "black" if min(own, label) < 0 else RIGHT if label == own else WRONG
            row.append(Cell(fitted(image(number)), title, colour))
        rows.append(row)
    save_rows(path, rows, mean=mean, std=std)


def fitted(image: Tensor) -> Tensor:
    """An image ``[C, H, W]`` whose longer side has :data:`SIDE` pixels; one that is small stays as it is."""
    longest = max(image.shape[1:])
    if longest < SIDE / 2:
        return image
    size = [max(1, round(side * SIDE / longest)) for side in image.shape[1:]]
    return interpolate(image[None], size, mode="bilinear", antialias=True)[0]

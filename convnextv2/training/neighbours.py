"""A picture of what the features take for alike: a few images, and those nearest to them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from convnextv2.data.datasets import spread
from convnextv2.evaluation.features import pooled
from convnextv2.evaluation.neighbours import nearest
from convnextv2.models.encoder import Encoder
from convnextv2.models.modes import evaluation_mode
from convnextv2.training.pictures import DPI, picture, true_colours

QUERIES, NEAREST, SAMPLE = 6, 7, 256
"""Rows of the picture, neighbours in a row, and images among which they are sought."""
SAMPLE_BYTES = 2**26
"""Of those images in memory: fewer than :data:`SAMPLE` where they are large."""
_CELL, _GAP, _TEXT = 112, 8, 20


def sample_size(images: int, shape: Sequence[int]) -> int:
    """How many of so many images of a shape (C, H, W) are looked through."""
    return min(images, SAMPLE, max(2, SAMPLE_BYTES // (4 * int(np.prod(shape)))))


@torch.no_grad()
def features_of(encoder: Encoder, images: Tensor, batch_size: int = 64) -> Tensor:
    """float32 ``[N, F]``, on the processor, of images ``[N, C, H, W]``: the mean over the last map's cells."""
    device = next(encoder.parameters()).device
    with evaluation_mode(encoder):
        maps = (encoder.forward_features(batch.to(device)) for batch in images.split(batch_size))
        return torch.cat([pooled(one, "mean").cpu() for one in maps])


def save_neighbours(
    path: str | os.PathLike[str], images: Tensor, features: Tensor, *, mean: Sequence[float], std: Sequence[float]
) -> None:
    """A row an image, of :data:`QUERIES` spread evenly: itself, then the nearest of the others, with the cosine
    similarity of their features.

    Args:
        path: of the PNG file.
        images: ``[N, C, H, W]``, normalised with ``mean`` and ``std``.
        features: ``[N, F]``.
        mean, std: one number a channel.

    Raises ValueError unless there are two images or more and features of each, OSError if the file cannot be written.
    """
    if len(images) < 2 or len(features) != len(images):
        raise ValueError(f"expected features of at least two images, got {len(features)} of {len(images)}")
    queries = spread(len(images), QUERIES)[:QUERIES]
    values, numbers = nearest(features, queries, NEAREST)
    rows = []
    for query, similarities, others in zip(queries, values.tolist(), numbers.tolist(), strict=True):
        shown = zip((query, *others), ("image", *(f"{value:.3f}" for value in similarities)), strict=True)
        rows.append([Cell(images[number], title) for number, title in shown])
    save_rows(path, rows, mean=mean, std=std)


class Cell(NamedTuple):
    """An image ``[C, H, W]``, normalised, what is said above it, and in which colour."""

    image: Tensor
    title: str
    colour: str = "black"


def magnification(width: int) -> int:
    """Pixels of the screen a side of a pixel of images of this width."""
    return max(1, round(_CELL / width)) if width < _CELL else 1


def save_rows(
    path: str | os.PathLike[str], rows: Sequence[Sequence[Cell]], *, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Rows of images of one size, a title above each; small ones are drawn with a whole number of the screen's pixels.

    ``mean`` and ``std``, one number a channel, are those that the images were normalised with. Raises OSError if the
    file cannot be written.
    """
    height, width = rows[0][0].image.shape[1:]
    scale = magnification(width)
    cell_h, cell_w = height * scale + _TEXT + _GAP, width * scale + _GAP
    columns = max(map(len, rows))
    canvas = np.ones((len(rows) * cell_h + _GAP, columns * cell_w + _GAP, 3), dtype=np.float32)
    total_h, total_w = canvas.shape[:2]
    with picture(path, total_w / DPI, total_h / DPI) as figure:
        for row, cells in enumerate(rows):
            shown = true_colours(torch.stack([cell.image for cell in cells]), mean, std)
            for column, (_, title, colour) in enumerate(cells):
                top, left = _GAP + row * cell_h + _TEXT, _GAP + column * cell_w
                pixels = shown[column].repeat_interleave(scale, -1).repeat_interleave(scale, -2).permute(1, 2, 0)
                canvas[top : top + height * scale, left : left + width * scale] = pixels.numpy()
                middle, above = (left + width * scale / 2) / total_w, 1 - (top - _TEXT / 2) / total_h
                figure.text(middle, above, title, ha="center", va="center", size=8, color=colour, parse_math=False)
        figure.figimage(canvas)

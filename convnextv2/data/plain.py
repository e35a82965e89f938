"""Labelled images as they are evaluated, and a share of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from convnextv2.data.datasets import ImageDataset, PredictDataset
from convnextv2.data.names import name_of
from convnextv2.data.sources import DataError, Part, Subset
from convnextv2.data.subsets import label_subset


class PlainDataset(PredictDataset):
    """The images of an :class:`ImageDataset`, each once, without augmentation.

    No other image stands in for one that cannot be read: it is reported, as in prediction. ``files`` are what the
    images are called. Raises DataError if none of the images can be read.
    """

    def __init__(self, images: ImageDataset) -> None:
        names = [Path(name_of(images.source, number)) for number in range(len(images))]
        channels, height, width = images.examples(1).shape[1:]
        super().__init__(names, images.plain_transform, (channels, height, width))
        self.source, self.labels, self.classes = images.source, images.labels, images.classes

    def load(self, index: int) -> Any:
        return self.source.load(index)


def label_fraction(images: ImageDataset, fraction: float, seed: int = 0) -> ImageDataset:
    """A share of every class, at least one image of it, drawn by ``seed``; of one seed the smaller is part of the
    larger.

    Raises:
        ValueError: unless ``fraction`` is above 0 and at most 1.
        DataError: if the images have no labels.
    """
    if images.labels is None:
        raise DataError(f"{images.what}: has no labels; expected one an image")
    chosen = label_subset(images.labels, fraction, seed)
    part = Part(Subset(images.source, chosen), [images.labels[number] for number in chosen], images.skipped)
    return replace(images, part=part, bad=())

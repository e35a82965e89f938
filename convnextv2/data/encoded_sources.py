"""Sources whose images are files in memory, each had by its number."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from convnextv2.data.decoding import UnreadableImageError, Wanted
from convnextv2.data.encoded import Stored
from convnextv2.data.images import load_image
from convnextv2.data.native import settled

SAMPLED = 16
"""Images that are looked at to decide how all are read."""


class EncodedSource(ABC):
    """A :class:`~.sources.Source`; subclasses are frozen dataclasses that have the two fields."""

    in_chans: int
    wanted: Wanted

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encoded(self, index: int) -> Stored:
        """The file of an image; UnreadableImageError if it cannot be had."""

    def load(self, index: int) -> Any:
        """As that of every source."""
        return load_image(self.encoded(index), self.in_chans, self.wanted)


def settled_by_sample(wanted: Wanted, images: EncodedSource) -> Wanted:
    """As :func:`~.native.settled`, of some of the images, spread evenly."""
    if wanted.pixels != "auto" or not len(images):
        return settled(wanted, [])
    files = list[Stored]()
    for number in np.unique(np.linspace(0, len(images) - 1, SAMPLED).round().astype(int)):
        with contextlib.suppress(UnreadableImageError):
            files.append(images.encoded(int(number)))
    return settled(wanted, files)

"""What every source of images is: decoded images, in parts, with what is known about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from convnextv2.data.augmentation import Augmentation, Statistics
from convnextv2.data.decoding import USUAL, Wanted
from convnextv2.data.images import load_image
from convnextv2.data.rasters import Decoded
from convnextv2.messages import one_line

CROP_SCALES: Mapping[str, tuple[float, float]] = {"pretrain": (0.2, 1.0), "finetune": (0.08, 1.0)}
"""Shares of an image's area that random crops take, by task, where a source has no reason for others."""


class DataError(ValueError):
    """No usable data; the message, one line, says what was looked for, where, and what was found."""

    def __init__(self, message: object = "") -> None:
        # torch raises an error of a loader's worker anew, behind its traceback.
        super().__init__(one_line(str(message).rpartition(f"{type(self).__name__}: ")[2]))


def stratified_split(labels: Sequence[int], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of a training and a validation part, both sorted; every class is split in the same proportion.

    A class of two or more images has at least one in each part; a single image is for training. Raises ValueError
    unless ``val_fraction`` lies strictly between 0 and 1.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie strictly between 0 and 1, got {val_fraction}")
    rng, numbers = np.random.default_rng(seed), np.asarray(labels)
    train, val = list[int](), list[int]()
    for label in np.unique(numbers):
        order = rng.permutation(np.flatnonzero(numbers == label)).tolist()
        count = min(len(order) - 1, max(1, round(len(order) * val_fraction)))
        val += order[:count]
        train += order[count:]
    return sorted(train), sorted(val)


def describe_skipped(skipped: Sequence[tuple[Path, str]], shown: int = 5) -> list[str]:
    """A heading with the number of files left out, a line for each of the first ``shown``, and one for the others."""
    if not skipped:
        return []
    lines = [f"notice: skipped {len(skipped)} unusable file{'s' if len(skipped) > 1 else ''}:"]
    lines += [" ".join(f"{path}: {reason}".split()) for path, reason in skipped[:shown]]
    return [*lines, f"… and {len(skipped) - shown} more"] if len(skipped) > shown else lines


class Source(Protocol):
    """Decoded images by number. A method ``name(index)`` may say what an image is called in messages."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Decoded:
        """The image; UnreadableImageError if it cannot be decoded."""


@runtime_checkable
class SequentialSource(Protocol):
    """Decoded images in an order of their own: for files that are read from beginning to end, such as tar shards."""

    def read(self, share: int, shares: int) -> Iterator[tuple[int, Decoded, int | None]]:
        """The images of share number ``share``, from 0, of ``shares``: (number, image, label or None).

        The shares together are every readable image once; a share may be empty. An image, as :meth:`Source.load` gives
        it, has the same number however many shares there are. A loader may ask any process for any share, any number
        of times; a source keeps no file open in between.
        """


@dataclass(frozen=True)
class FileSource:
    """Images in files."""

    paths: Sequence[Path]
    in_chans: int
    wanted: Wanted = USUAL

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Decoded:
        return load_image(self.paths[index], self.in_chans, self.wanted)


@dataclass(frozen=True)
class Subset:
    """The images of another source that have these numbers."""

    source: Source
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def load(self, index: int) -> Decoded:
        return self.source.load(self.numbers[index])


@dataclass(frozen=True)
class Part:
    """Images that are trained or validated on.

    Args:
        labels: index into the source's classes of each image, or None.
        skipped: files left out, and why.
    """

    images: Source | SequentialSource
    labels: Sequence[int] | None = None
    skipped: Sequence[tuple[Path, str]] = ()

    @property
    def by_number(self) -> Source:
        """``images``, for what takes them in any order; DataError if they can only be read from beginning to end."""
        if isinstance(self.images, SequentialSource):
            raise DataError("images that are read in sequence cannot be split or shuffled; store them as files")
        return self.images


@dataclass(frozen=True)
class OpenedSource:
    """Everything about what the user named.

    Args:
        description: what it is, in a few words.
        train: the images to train on; all images where ``val`` is None.
        val: the images to validate on, where the source itself tells them apart.
        classes: names of the labels.
        hold_out: whether pre-training, too, leaves out the images that :meth:`split` gives to validation.
        statistics: (mean, std), one number a channel; None takes those of :data:`~.transforms.DEFAULT_STATISTICS`.
        crop_scale: as :data:`CROP_SCALES`.
        hflip: probability of a horizontal flip in training.
    """

    description: str
    train: Part
    val: Part | None = None
    classes: Sequence[str] = ()
    hold_out: bool = False
    statistics: Statistics | None = None
    crop_scale: Mapping[str, tuple[float, float]] = field(default_factory=lambda: CROP_SCALES)
    hflip: float = 0.5

    def augmentation(self, task: str, wish: Augmentation | None) -> Augmentation:
        """``wish``, with the choice for a task of :data:`CROP_SCALES` where it leaves it open."""
        wish = wish or Augmentation()
        hflip = self.hflip if wish.hflip is None else wish.hflip
        return replace(wish, crop_scale=wish.crop_scale or self.crop_scale[task], hflip=hflip)

    def split(self, val_fraction: float, seed: int) -> tuple[Part, Part]:
        """Training and validation part: the source's own, else parted at random by :func:`stratified_split`; DataError
        if images have no labels."""
        labels = self.train.labels
        if labels is None or (self.val is not None and self.val.labels is None):
            raise DataError(f"{self.description}: has no labels; expected one an image")
        if self.val is not None:
            return self.train, self.val
        parts = stratified_split(labels, val_fraction, seed)
        train, val = (Part(Subset(self.train.by_number, numbers), [labels[i] for i in numbers]) for numbers in parts)
        return replace(train, skipped=self.train.skipped), val

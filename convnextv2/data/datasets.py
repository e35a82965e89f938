"""Data sets: normalised tensors from a source, for training and for prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from convnextv2.data.decoding import USUAL, UnreadableImageError, Wanted
from convnextv2.data.images import load_image
from convnextv2.data.names import name_of
from convnextv2.data.now_reading import NowReading
from convnextv2.data.sources import DataError, Part, SequentialSource
from convnextv2.data.transforms import Statistics, Transform, sample_seed


class _Epochs:
    """Transforms seeded by (seed, epoch, number of the sample)."""

    transform: Transform
    seed: int

    def __post_init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which decides how samples are augmented."""
        self._epoch.fill_(epoch)

    def _transformed(self, decoded: Any, number: int) -> Tensor:
        with sample_seed(self.seed, int(self._epoch), number):
            return self.transform(decoded)


@dataclass(eq=False, repr=False)
class ImageDataset(_Epochs, Dataset[Any]):
    """Images as normalised tensors ``[C, H, W]``, or pairs (image, label). Picklable, for workers.

    A random transform is seeded by (seed, epoch, index): call :meth:`set_epoch` before each epoch, also where the
    workers persist; the epoch lies in shared memory.

    ``source``, ``labels`` and ``skipped`` are those of the part, ``mean`` and ``std`` the statistics. ``damaged``, in
    memory that workers share, marks the images for which others stand in.

    Args:
        transform: from a decoded image to a tensor; ``plain_transform`` is the same without randomness, for pictures.
        statistics: the normalisation inside ``transform``.
        classes: names of the labels.
        what: the part in a few words.
        bad: numbers of images that are known to be unreadable.
    """

    part: Part
    transform: Transform
    plain_transform: Transform
    statistics: Statistics
    classes: Sequence[str] = ()
    _: KW_ONLY
    seed: int = 0
    what: str = ""
    bad: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source, self.labels, self.skipped = self.part.by_number, self.part.labels, list(self.part.skipped)
        self.mean, self.std = self.statistics
        of = f" of {len(self.classes)} classes" if self.classes else ""
        self.description = f"{self.what}: {len(self)} images{of}"
        self.damaged = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        self.damaged[list(self.bad)] = True
        self.now_reading = NowReading()

    @property
    def replaced(self) -> list[int]:
        """Numbers of the images that could not be decoded so far, in any worker: others stand in for them."""
        return self.damaged.nonzero().flatten().tolist()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        """Sample ``index``, or the next readable one; DataError if no sample is."""
        index = range(len(self))[index]
        found, decoded = self.load(index)
        image = self._transformed(decoded, index)
        return image if self.labels is None else (image, self.labels[found])

    def load(self, index: int, read: Callable[[int], Any] | None = None) -> tuple[int, Any]:
        """Number and decoded image of the next one that is readable, by ``read`` or the source; errors as above."""
        reason = ""
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            self.now_reading.begin(candidate)
            try:
                return candidate, (read or self.source.load)(candidate)
            except UnreadableImageError as error:
                self.damaged[candidate] = True
                reason = reason or f"{name_of(self.source, candidate)}: {error}"
            finally:
                self.now_reading.begin(-1)
        raise DataError(f"{self.what}: none of the {len(self)} images can be read: {reason}")

    def examples(self, count: int) -> Tensor:
        """``[n, C, H, W]``: up to ``count`` images spread evenly over the data set, without augmentation."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        return torch.stack([self.plain_transform(self.load(int(index))[1]) for index in chosen])


@dataclass(eq=False, repr=False)
class SequentialDataset(_Epochs, IterableDataset[Any]):
    """Images of a sequential source as normalised tensors, or pairs (image, label), once an epoch.

    Processes and loader workers take different shares. Transforms are seeded as those of :class:`ImageDataset`.

    Args:
        process, processes: number, from 0, of the process that reads, and how many there are.
    """

    source: SequentialSource
    transform: Transform
    _: KW_ONLY
    seed: int = 0
    process: int = 0
    processes: int = 1

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for number, decoded, label in self.source.read(self.process * workers + worker, self.processes * workers):
            image = self._transformed(decoded, number)
            yield image if label is None else (image, label)


def spread(total: int, wanted: int) -> list[int]:
    """All numbers below ``total``: first ``wanted`` of them evenly spaced, so that folders are sampled throughout."""
    first = [number * total // wanted for number in range(wanted)] if wanted < total else range(total)
    return list(dict.fromkeys([*first, *range(total)]))


@dataclass(eq=False, repr=False)
class PredictDataset(Dataset[Any]):
    """Yields (image, index, reason): reason is empty, or says why the file cannot be read; the image is then zero.

    Args:
        files: the images, in the order of their names.
        shape: (C, H, W) of what ``transform`` gives.
        skipped: what the search left out, and why.
        wanted: what else is wanted of the files.
    """

    files: Sequence[Path]
    transform: Transform
    shape: tuple[int, int, int]
    skipped: Sequence[tuple[Path, str]] = ()
    wanted: Wanted = USUAL

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> Any:
        """Decoded image; UnreadableImageError if it cannot be decoded."""
        return load_image(self.files[index], self.shape[0], self.wanted)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        try:
            return self.transform(self.load(index)), index, ""
        except UnreadableImageError as error:
            return torch.zeros(self.shape), index, str(error)

    def numbered_examples(self, count: int) -> tuple[list[int], list[Tensor], list[tuple[Path, str]]]:
        """Numbers of up to ``count`` readable images, spread evenly; these images, ``[C, H, W]``; and the unreadable
        files met, with reasons."""
        chosen, images, unreadable = list[int](), list[Tensor](), list[tuple[Path, str]]()
        for number in spread(len(self), count):
            image, _, reason = self[number]
            if reason:
                unreadable.append((self.files[number], reason))
                continue
            chosen.append(number)
            images.append(image)
            if len(images) == count:
                break
        return chosen, images, unreadable

    def examples(self, count: int) -> tuple[list[Tensor], list[tuple[Path, str]]]:
        """The same without the numbers."""
        return self.numbered_examples(count)[1:]

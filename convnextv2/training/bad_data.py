"""Images that become unreadable while a run reads them: counted, told, and too many of them end the run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from convnextv2.data.datasets import ImageDataset
from convnextv2.data.decoding import UnreadableImageError
from convnextv2.data.listings import ListingCheck
from convnextv2.data.names import name_of
from convnextv2.data.sources import DataError
from convnextv2.training.device import Accelerator

CHECK_EVERY = 100
"""Batches between two looks at how much is gone."""
SHOWN = 5


@dataclass(frozen=True)
class BadData:
    """Watches over the parts of a run's data; what is found in several processes is put together.

    Args:
        most: share of a part that may be unreadable.
        say: tells the user, in the first process.
    """

    parts: Sequence[ImageDataset]
    most: float
    accelerator: Accelerator
    say: Callable[[str], None]
    listings: ListingCheck = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "listings", ListingCheck([part.source for part in self.parts]))

    def tell(self, done: int, when: str = "") -> None:
        """A line for each part that has unreadable images; then as :meth:`check`. For all processes at once."""
        found = self._found()
        for part, numbers in found:
            if numbers and self.accelerator.is_main_process:
                self.say(f"notice: {when}{self._line(part, numbers)}")
        self._check(found, done)

    def check(self, done: int) -> None:
        """Raise DataError if more of a part is unreadable than may be; ``done`` epochs have been saved."""
        self._check(self._found(), done)

    def watch(self, loader: Any, done: int) -> Any:
        """``loader``, which is then looked after between its batches."""
        for line in self.listings.end():  # a loader may start processes, which is no moment for a thread at work
            self.say(line)
        return _Watched(loader, self, done)

    def _found(self) -> list[tuple[ImageDataset, list[int]]]:
        if self.accelerator.num_processes == 1:
            return [(part, part.replaced) for part in self.parts]
        marks = torch.cat([part.damaged for part in self.parts]).int().to(self.accelerator.device)
        marks = self.accelerator.reduce(marks, "sum").cpu()
        split = marks.split([len(part) for part in self.parts])
        return [(part, mark.nonzero().flatten().tolist()) for part, mark in zip(self.parts, split, strict=True)]

    def _check(self, found: list[tuple[ImageDataset, list[int]]], done: int) -> None:
        for part, numbers in found:
            if len(numbers) > self.most * len(part):
                saved = f"{done} epochs are saved, continue with `resume`" if done else "no epoch had been finished"
                raise DataError(
                    f"stopped, more than `max_bad` {self.most:g} of the data; {saved}: " + self._line(part, numbers)
                )

    def _line(self, part: ImageDataset, numbers: list[int]) -> str:
        few = [_why(part, number) for number in numbers[:SHOWN]]
        few += [f"… and {len(numbers) - SHOWN} more"] if len(numbers) > SHOWN else []
        return f"{len(numbers)} of {len(part)} images of {part.what} cannot be read, others stand in: {'; '.join(few)}"


def _why(part: ImageDataset, number: int) -> str:
    """What an image is called, and why it cannot be read: as it is now, for it may have been seen in a worker."""
    name = name_of(part.source, number)
    try:
        part.source.load(number)
    except UnreadableImageError as error:
        return f"{name}: {error}"
    return f"{name}: can be read again"


@contextlib.contextmanager
def told_if_worker_dies(parts: Sequence[ImageDataset]) -> Iterator[None]:
    """Turn what torch raises where a process that loads images dies into DataError, with the image it was at."""
    try:
        yield
    except RuntimeError as error:
        died = re.search(r"DataLoader worker \(pid\(?s?\)? (\d+)[^)]*\)(.*)", str(error))
        if died is None:
            raise
        at = [(part, number) for part in parts if (number := part.now_reading.of(int(died[1]))) is not None]
        how = died[2].strip().removesuffix(".") or "ended"
        where = f"while it read {name_of(at[0][0].source, at[0][1])}" if at else "between two images"
        raise DataError(
            f"a process that loads images {how} {where}; take such a file out, or try fewer `workers`, which share the "
            "memory; `workers` 0 loads in the process that trains"
        ) from error


@dataclass(frozen=True)
class _Watched:
    loader: Any
    bad: BadData
    done: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.loader, 1):
            yield batch
            if number == 1 and self.bad.accelerator.is_main_process:
                self.bad.listings.begin()
            if number % CHECK_EVERY == 0:
                self.bad.check(self.done)

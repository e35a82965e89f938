"""What probes of a run may cost, and what they need not do twice."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from convnextv2.training.so_far import is_number

SHARE = 0.05
"""Of a run's time that probes take where their number is left open."""


@dataclass
class Budget:
    """What probes have cost, in seconds, and whether one more fits into :data:`SHARE` of the run.

    Args:
        trained: of training, in all sessions.
        spent: on probes, in all sessions.
        image: for the features of one image, as trials have it; 0 for not yet.
        features: for one pass of the images, when they were last seen; 0 for not yet.
        linear: for the last linear classifier; 0 for not yet.
        picture: for the last picture of neighbours; 0 for not yet.
    """

    trained: float = 0.0
    spent: float = 0.0
    image: float = 0.0
    features: float = 0.0
    linear: float = 0.0
    picture: float = 0.0

    @classmethod
    def read(cls, saved: Any) -> Budget:
        """From a run's progress, or a new one where that holds none."""
        names = {item.name for item in fields(cls)}
        good = isinstance(saved, Mapping) and saved.keys() == names
        if not good or not all(is_number(value) and 0 <= value < 1e12 for value in saved.values()):
            return cls()
        return cls(**saved)

    def allows(self, cost: float, last: float, done: float) -> bool:
        """Whether ``cost`` fits into the share of the run so far, and leaves what ``last``, the probe after the last
        epoch, will take of the whole run, of which the share ``done`` is behind."""
        now = self.spent + cost
        return cost <= self.left and now + last <= SHARE * (self.trained / done + now + last)

    @property
    def left(self) -> float:
        """Seconds that may be spent now."""
        return SHARE / (1 - SHARE) * self.trained - self.spent


class TooLongError(Exception):
    """A pass over the images that does not end in time."""


class Kept:
    """Batches of a loader that is read again and again: kept from the first pass on if they fit into ``most`` bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._batches: list[Any] | None = None

    def __call__(self, loader: Iterable[Any]) -> Iterable[Any]:
        return self._first(loader) if self._batches is None else self._batches

    def _first(self, loader: Iterable[Any]) -> Iterator[Any]:
        kept, size = list[Any](), 0
        for images, numbers, reasons in loader:
            yield images, numbers, reasons
            size += images.nbytes
            if size > self._most:
                kept.clear()
            else:  # those of a worker lie in memory that is shared, of which there is little
                kept.append((images.clone(), numbers.clone(), reasons))
        self._batches = kept if size <= self._most else None


def until(end: float, kept: Kept, loader: Iterable[Any]) -> Iterator[Any]:
    """The batches that are kept, or those of the loader; TooLongError once the clock shows ``end``."""
    for batch in kept(loader):
        if time.perf_counter() > end:
            raise TooLongError
        yield batch

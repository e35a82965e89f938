"""What an epoch has come to; a state that is saved inside of one keeps it."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from typing import Any

MOST = 2**53
"""What a run cannot count up to."""


@dataclass
class SoFar:
    """What an epoch has come to, over all processes and sessions.

    Args:
        batches: done, of each process.
        images: in them, of all processes: the places in the order of the epoch that are used up.
        loss, losses: sum, and number, of the losses of batches that were finite.
        norm, norms: sum, and number, of the norms of the gradient that were taken.
        seconds: of training.
        waited: of those, for the loader, by the first process.
    """

    batches: int = 0
    images: int = 0
    loss: float = 0.0
    losses: int = 0
    norm: float = 0.0
    norms: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def mean(self) -> float:
        """Loss."""
        return self.loss / self.losses if self.losses else math.nan


def is_so_far(values: Any) -> bool:
    """Whether a value of JSON is what :class:`SoFar` holds."""
    if not isinstance(values, dict) or values.keys() != {item.name for item in fields(SoFar)}:
        return False
    whole = [type(values[name]) is int and values[name] < MOST for name in ("batches", "images", "losses", "norms")]
    return (
        all(whole)
        and all(map(is_number, values.values()))
        and all(value >= 0 for name, value in values.items() if name != "loss")
    )


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max

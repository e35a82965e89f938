"""A share of the labels: what is left of a data set where labels are few."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def label_subset(labels: Sequence[int], fraction: float, seed: int) -> list[int]:
    """Indices, sorted, of that share of every class, at least one of each.

    Of one ``seed``, a smaller share is a part of every larger one. Raises ValueError unless ``fraction`` is in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    rng, numbers = np.random.default_rng(seed), np.asarray(labels)
    chosen = list[int]()
    for label in np.unique(numbers):
        order = rng.permutation(np.flatnonzero(numbers == label)).tolist()
        chosen += order[: max(1, round(len(order) * fraction))]
    return sorted(chosen)

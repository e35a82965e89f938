"""Shares of the labels: stratified, nested, by seed."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from convnextv2.data.subsets import label_subset

LABELS = [0] * 40 + [1] * 20 + [2] * 3 + [1] * 20


@pytest.mark.parametrize(("fraction", "counts"), [(1.0, (40, 40, 3)), (0.25, (10, 10, 1)), (0.01, (1, 1, 1))])
def test_every_class_keeps_its_share_and_at_least_one(fraction: float, counts: tuple[int, ...]) -> None:
    chosen = label_subset(LABELS, fraction, seed=3)
    assert chosen == sorted(set(chosen))
    assert tuple(count for _, count in sorted(Counter(LABELS[index] for index in chosen).items())) == counts


def test_a_smaller_share_is_part_of_a_larger_one_and_seeds_differ() -> None:
    shares = [set(label_subset(LABELS, fraction, seed=1)) for fraction in (0.05, 0.1, 0.33, 0.5, 1.0)]
    assert all(small < large for small, large in itertools.pairwise(shares))
    assert label_subset(LABELS, 0.1, seed=1) == label_subset(LABELS, 0.1, seed=1) != label_subset(LABELS, 0.1, seed=2)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\]"):
        label_subset(LABELS, fraction, seed=0)

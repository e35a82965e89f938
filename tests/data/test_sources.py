from pathlib import Path

import pytest

from convnextv2.data.sources import describe_skipped, stratified_split


def test_split_is_stratified_seeded_and_disjoint() -> None:
    labels = [0] * 10 + [1] * 20 + [2] + [3] * 2
    train, val = stratified_split(labels, 0.2, 1)
    assert sorted(train + val) == list(range(33))
    assert [sum(labels[i] == c for i in val) for c in range(4)] == [2, 4, 0, 1]
    assert (train, val) == stratified_split(labels, 0.2, 1)
    assert val != stratified_split(labels, 0.2, 2)[1]
    for fraction in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="val_fraction"):
            stratified_split(labels, fraction, 0)


def test_skipped_files_are_described() -> None:
    assert describe_skipped([]) == []
    assert describe_skipped([(Path("a"), "why\nso")]) == ["notice: skipped 1 unusable file:", "a: why so"]
    lines = describe_skipped([(Path(f"x\n{i}"), "why") for i in range(8)], shown=2)
    assert lines == ["notice: skipped 8 unusable files:", "x 0: why", "x 1: why", "… and 6 more"]

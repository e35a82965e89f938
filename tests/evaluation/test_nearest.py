"""Nearest features, and images that are far from theirs."""

from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from convnextv2.evaluation import neighbours
from convnextv2.evaluation.neighbours import all_nearest, distances, farthest, nearest


def test_the_nearest_in_cosine_similarity_without_itself() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 3.0], [5.0, 0.1], [1.0, 1.0], [torch.nan, 1.0]])
    values, numbers = nearest(features, [0, 1], 3)
    assert numbers[0].tolist()[:2] == [2, 3]
    assert numbers[1].tolist()[:2] == [4, 3]
    assert values[0, 1] == pytest.approx(0.5**0.5)
    assert nearest(features[:2], [0], 7)[1].tolist() == [[1]]


def test_all_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of a few rows, too."""
    features = torch.randn(57, 12) + 1
    theirs = NearestNeighbors(n_neighbors=6, metric="cosine", algorithm="brute").fit(features.numpy())
    apart, numbers = theirs.kneighbors(features.numpy())  # the first is the image itself
    for held, blocks in ((neighbours.SIMILARITIES, [57]), (57 * 20, [20, 20, 17]), (1, [1] * 57)):
        monkeypatch.setattr(neighbours, "SIMILARITIES", held)
        seen: list[torch.Tensor] = []
        values, found = all_nearest(features, 5, progress=lambda all_, kept=seen: kept.extend(all_) or kept)
        assert [len(block) for block in seen] == blocks
        assert found.tolist() == numbers[:, 1:].tolist()
        torch.testing.assert_close(values, torch.from_numpy(1 - apart[:, 1:]).float(), rtol=0, atol=1e-6)


def test_twins_are_nearest_and_what_is_not_finite_is_far() -> None:
    features = torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0], [torch.nan, torch.inf], [0.0, 0.0]])
    values, found = all_nearest(features, 2)
    assert found[:2, 0].tolist() == [1, 0]
    assert values[0, 0] == pytest.approx(1)
    assert values[3:].abs().max() == 0
    assert all(number not in row for number, row in enumerate(found.tolist()))
    assert all_nearest(features[:2], 9)[1].tolist() == [[1], [0]]


def test_the_farthest_first() -> None:
    features = torch.eye(8)[[0, 0, 0, 0, 1]] + 0.01 * torch.randn(5, 8)
    values, _ = all_nearest(features, 10)
    assert values.shape == (5, 4)
    assert farthest(values, 2)[0] == 4
    assert distances(values)[4] == pytest.approx(1 - float(values[4].mean()))
    assert distances(values)[4] > 0.9 > distances(values)[:4].max()
    assert len(farthest(values, 50)) == 5
    many = torch.cat([torch.ones(1, 10), torch.zeros(1, 5)], 1)
    assert distances(many).tolist() == [0]  # ten neighbours count


@pytest.mark.parametrize(("features", "count"), [(torch.ones(1, 3), 2), (torch.ones(4, 3), 0), (torch.ones(0, 3), 1)])
def test_too_few(features: torch.Tensor, count: int) -> None:
    with pytest.raises(ValueError, match="two images or more and one neighbour or more"):
        all_nearest(features, count)

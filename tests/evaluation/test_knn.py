from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from convnextv2.evaluation import Features, knn_predict
from convnextv2.evaluation import knn as knn_module


def labelled(values: Tensor, labels: Tensor) -> Features:
    return Features(values, labels, tuple(Path(str(number)) for number in range(len(values))))


def overlapping(count: int, seed: int) -> Features:
    """Five classes that lie close together."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (count,), generator=generator)
    return labelled(centres[labels] + 1.5 * torch.randn(count, 16, generator=generator), labels)


def weights(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp((1 - distance) / 0.07)


@pytest.mark.parametrize("k", [1, 20, 400])
def test_as_scikit_learn(k: int) -> None:
    train, test = overlapping(400, 1), overlapping(300, 2)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(train.values.numpy(), train.labels.numpy())
    expected = theirs.predict(test.values.numpy())
    found = knn_predict(train, test.values, k=k)
    assert found.dtype == torch.int64
    assert found.tolist() == expected.tolist()
    assert 0.3 < float((found == test.labels).float().mean()) < 1
    assert torch.equal(knn_predict(train, 1000 * test.values, k=k), found)


def test_near_neighbours_outvote_far_ones() -> None:
    """Cosines 1, 0.8 and 0.8: e to the 1 / 0.07 is more than twice e to the 0.8 / 0.07, and e to the 1 is not."""
    train = labelled(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]]), torch.tensor([0, 1, 1]))
    assert knn_predict(train, torch.tensor([[2.0, 0.0]]), k=3).tolist() == [0]


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = overlapping(50, 1), overlapping(33, 2)
    expected = knn_predict(train, test.values)
    sizes = []
    topk = Tensor.topk

    def watched(self: Tensor, *args: int, **options: int) -> object:
        sizes.append(tuple(self.shape))
        return topk(self, *args, **options)

    monkeypatch.setattr(Tensor, "topk", watched)
    monkeypatch.setattr(knn_module, "SIMILARITIES", 501)
    assert torch.equal(knn_predict(train, test.values), expected)
    assert sizes == [(10, 50)] * 3 + [(3, 50)]
    monkeypatch.setattr(knn_module, "SIMILARITIES", 1)
    assert torch.equal(knn_predict(train, test.values), expected)


def test_more_neighbours_than_there_are_and_features_of_zeros() -> None:
    train = labelled(torch.tensor([[0.0, 0.0], [1.0, 0.1], [0.1, 1.0]]), torch.tensor([0, 4, 2]))
    assert knn_predict(train, torch.tensor([[3.0, 0.0], [0.0, 3.0]]), k=100).tolist() == [4, 2]
    assert knn_predict(train, torch.zeros(0, 2)).tolist() == []


def test_what_is_refused() -> None:
    train = overlapping(5, 1)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        knn_predict(train, train.values, k=0)
    with pytest.raises(ValueError, match=r"expected features \[M, 16\], got \[5, 8\]"):
        knn_predict(train, train.values[:, :8])
    for labels in (torch.full((5,), -1), torch.zeros(0)):
        with pytest.raises(ValueError, match="these have no labels"):
            knn_predict(labelled(train.values[: len(labels)], labels), train.values)

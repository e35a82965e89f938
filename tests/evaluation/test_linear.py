from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convnextv2.evaluation import Features, fit_linear, linear_predict
from convnextv2.evaluation.linear import DEFAULT, GRID


@pytest.fixture(autouse=True)
def no_warnings() -> None:
    warnings.simplefilter("error")


def labelled(values: Tensor, labels: Tensor) -> Features:
    return Features(values, labels, tuple(Path(str(number)) for number in range(len(values))))


def drawn(count: int, noise: float = 1.0, width: int = 40, seed: int = 0) -> Features:
    """Five classes, in features that go together and are of very different sizes, as those of an untrained network."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(100)
    centres, mixing = torch.randn(5, width, generator=fixed), torch.randn(width, width, generator=fixed)
    labels = torch.arange(count) % 5
    values = (centres[labels] + noise * torch.randn(count, width, generator=generator)) @ mixing
    return labelled(values * torch.logspace(-4, 2, width) + 10, labels)


def share_right(train: Features, test: Features) -> float:
    return float((linear_predict(fit_linear(train), test.values) == test.labels).float().mean())


def test_classes_in_features_of_any_size_are_learned() -> None:
    train, test = drawn(200), drawn(200, seed=1)
    assert share_right(train, test) > 0.95
    predicted = linear_predict(fit_linear(train), test.values)
    scaled = labelled(1e4 * train.values - 7, train.labels)
    assert torch.equal(linear_predict(fit_linear(scaled), 1e4 * test.values - 7), predicted)


def test_the_penalty_is_chosen_where_there_are_labels_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 5
    weak = torch.randn(200, 200, generator=generator) + 0.15 * torch.randn(5, 200, generator=generator)[labels]
    strong, mild = fit_linear(labelled(weak, labels))[-1].C, fit_linear(drawn(200, 6.0))[-1].C
    assert strong < DEFAULT < mild  # much noise asks for a strong penalty, directions of little variance for a mild one
    assert {strong, mild} <= set(GRID)
    for count in (5, 10, 14):  # the smallest class has one image, or two
        assert fit_linear(drawn(count, 6.0))[-1].C == DEFAULT


def test_a_seed_decides() -> None:
    train, test = drawn(60, 4.0), drawn(60, 4.0, seed=1)
    first, second = (linear_predict(fit_linear(train, seed=3), test.values) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("count", "width"), [(50, 320), (500, 320), (5000, 40)])
def test_it_converges(count: int, width: int) -> None:
    """Warnings are errors here, scikit-learn's about steps too."""
    assert fit_linear(drawn(count, 3.0, width))[-1].n_iter_.max() < 10_000


def test_labels_need_not_be_all_of_them() -> None:
    train = labelled(torch.tensor([[0.0], [0.1], [1.0], [1.1]]), torch.tensor([7, 7, 2, 2]))
    assert linear_predict(fit_linear(train), torch.tensor([[-1.0], [2.0]])).tolist() == [7, 2]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        fit_linear(labelled(torch.randn(4, 3), torch.ones(4, dtype=torch.int64)))
    with pytest.raises(ValueError, match="no labels"):
        fit_linear(labelled(torch.randn(4, 3), -torch.ones(4, dtype=torch.int64)))

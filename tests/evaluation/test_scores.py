from __future__ import annotations

import json
import math

import pytest
import torch
from sklearn import metrics

from convnextv2.evaluation import score
from convnextv2.files import finite


def test_as_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=generator) ** 2 // 3  # 0, 0, 1, 3: uneven, and 2 is missing
    predicted = torch.where(torch.rand(200, generator=generator) < 0.6, labels, labels.roll(1))
    found = score(predicted, labels, "abcd")
    true, guess = labels.numpy(), predicted.numpy()
    assert found.top1 == pytest.approx(100 * metrics.accuracy_score(true, guess))
    assert found.macro_f1 == pytest.approx(100 * metrics.f1_score(true, guess, average="macro"))
    assert found.confusion.tolist() == metrics.confusion_matrix(true, guess, labels=range(4)).tolist()
    recall = 100 * metrics.recall_score(true, guess, labels=[0, 1, 3], average=None)
    assert [*found.recall[:2], found.recall[3]] == pytest.approx(recall.tolist())
    assert math.isnan(found.recall[2])
    assert found.images == 200
    predicted[:5] = 2  # wrong, so that its F1 of 0 counts
    expected = 100 * metrics.f1_score(true, predicted.numpy(), average="macro", zero_division=0)
    assert score(predicted, labels, "abcd").macro_f1 == pytest.approx(expected)


def test_words_and_json() -> None:
    found = score(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), ["cat", "dog", "owl"])
    assert str(found) == "top-1 66.67 %, macro F1 66.67 %, 3 images"
    read = json.loads(json.dumps(finite(found.as_dict())))
    assert read["classes"] == [
        {"name": "cat", "recall": 100.0, "images": 1, "predicted": {"cat": 1}},
        {"name": "dog", "recall": 50.0, "images": 2, "predicted": {"cat": 1, "dog": 1}},
        {"name": "owl", "recall": None, "images": 0, "predicted": {}},
    ]
    assert (read["images"], read["top1"]) == (3, pytest.approx(200 / 3))


def test_what_is_refused() -> None:
    one = torch.tensor([1])
    for predicted, labels in (
        (torch.tensor([]), torch.tensor([])),
        (one, torch.tensor([1, 0])),
        (one[None], one[None]),
    ):
        with pytest.raises(ValueError, match=r"expected predictions \[N\] and labels \[N\] of at least one image"):
            score(predicted, labels, "ab")
    for predicted, labels, classes in ((one, 2 * one, "ab"), (-one, one, "ab"), (0 * one, 0 * one, "a")):
        with pytest.raises(ValueError, match=r"expected numbers of \d classes"):
            score(predicted, labels, classes)

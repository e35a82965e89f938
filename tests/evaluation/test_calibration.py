"""AUROC, calibration error and Brier score against scikit-learn and plain sums, and where they are not known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics

from convnextv2.evaluation import Features, fit_linear, knn_predict, knn_votes, score
from convnextv2.evaluation.calibration import BINS, calibration
from convnextv2.evaluation.linear import linear_probabilities
from convnextv2.files import finite
from convnextv2.training.reliability import save_reliability


def drawn(classes: int, count: int = 300, sharpness: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities that know something of the labels, and too sure of it."""
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator) + 1.2 * torch.nn.functional.one_hot(labels, classes)
    return (sharpness * logits).softmax(1), labels


@pytest.mark.parametrize("classes", [2, 5])
def test_as_scikit_learn_and_plain_sums(classes: int) -> None:
    probabilities, labels = drawn(classes)
    found = calibration(probabilities, labels)
    p, true = probabilities.double().numpy(), labels.numpy()
    areas = [metrics.roc_auc_score(true == label, p[:, label]) for label in range(classes)]
    assert found.auroc == pytest.approx(100 * np.mean(areas), abs=1e-3)
    if classes == 2:
        assert areas[0] == pytest.approx(areas[1])  # either class against the rest is the same question
    confidence, right = p.max(1), p.argmax(1) == true
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(confidence[places == i].sum() - right[places == i].sum()) for i in range(BINS)]
    assert found.error == pytest.approx(100 * sum(gaps) / len(true), abs=1e-3)
    assert found.error > 5
    assert found.brier == pytest.approx(np.square(p - np.eye(classes)[true]).sum(1).mean(), abs=1e-5)
    assert [one.images for one in found.bins] == [int((places == i).sum()) for i in range(BINS)]
    filled = [(one, i) for i, one in enumerate(found.bins) if one.images]
    assert all(one.accuracy == pytest.approx(100 * right[places == i].mean()) for one, i in filled)
    assert sum(one.images * abs(one.confidence - one.accuracy) for one, _ in filled) / len(true) == pytest.approx(
        found.error, abs=1e-3
    )


def test_certainty_is_in_the_last_bin() -> None:
    sure = torch.tensor([[1.0, 0.0], [0.97, 0.03], [1.0 + 1e-7, -1e-7], [1.0, 0.0]])
    found = calibration(sure, torch.tensor([0, 0, 0, 1]))
    assert [one.images for one in found.bins] == [0] * (BINS - 1) + [4]
    assert found.error == pytest.approx(100 * (0.9925 - 0.75), abs=1e-3)  # together, as one bin has it
    assert found.auroc == pytest.approx(100 / 3)  # two are as sure as the wrong one, and one is less sure


def test_classes_without_images_do_not_count() -> None:
    probabilities, labels = drawn(5)
    some = labels < 3
    p, true = probabilities[some], labels[some]
    areas = [metrics.roc_auc_score(true.numpy() == label, p[:, label].numpy()) for label in range(3)]
    assert calibration(p, true).auroc == pytest.approx(100 * np.mean(areas), abs=1e-3)
    one = score(p.argmax(1), torch.zeros_like(true), "abcde", p)  # a single class in the labels
    assert one.calibration is not None
    assert math.isnan(one.calibration.auroc)
    read = json.loads(json.dumps(finite(one.as_dict())))
    assert read["auroc"] is None
    assert read["calibration_error"] > 0
    assert sum(row["images"] for row in read["reliability"]) == len(true)
    assert "AUROC nan %, calibration error" in str(one)


def test_what_is_refused() -> None:
    half = torch.full((2, 2), 0.5)
    for probabilities, labels in (
        (half, torch.tensor([0])),
        (half[0], torch.tensor([0])),
        (half[:0], torch.tensor([])),
    ):
        with pytest.raises(ValueError, match=r"expected probabilities \[N, K\] and labels \[N\]"):
            calibration(probabilities, labels)
    for wrong in (math.nan, 2.0, -0.5, math.inf):
        with pytest.raises(ValueError, match="expected probabilities from 0 to 1"):
            calibration(torch.tensor([[wrong, 0.5]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"expected probabilities \[2, 3\], got \[2, 2\]"):
        score(torch.tensor([0, 1]), torch.tensor([0, 1]), "abc", half)


def test_votes_and_probabilities_have_a_column_for_every_class() -> None:
    """Of the three classes the middle one has no image to learn from."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 2] * 6)
    values = torch.randn(12, 4, generator=generator) + labels[:, None]
    train = Features(values, labels, tuple(map(Path, "abcdefghijkl")), ("x", "y", "z"))
    votes = knn_votes(train, values, k=3)
    assert votes.shape == (12, 3)
    assert not votes[:, 1].any()
    assert torch.equal(votes.argmax(1), knn_predict(train, values, k=3))
    pipeline = fit_linear(train)
    probabilities = linear_probabilities(pipeline, values, 3)
    assert not probabilities[:, 1].any()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(12))
    assert torch.equal(probabilities.argmax(1), torch.from_numpy(pipeline.predict(values.double().numpy())))


@pytest.mark.pictures
def test_the_picture_shows_the_bins(tmp_path: Path) -> None:
    save_reliability(tmp_path / "few.png", calibration(*drawn(3, count=1)))
    save_reliability(tmp_path / "many.png", calibration(*drawn(3)))
    blue = (31, 119, 180)
    pictures = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("few.png", "many.png"))
    few, many = (int((picture == blue).all(2).sum()) for picture in pictures)
    assert many > 3 * max(few, 100)

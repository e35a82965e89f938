"""How right predicted classes are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convnextv2.evaluation.calibration import Calibration, calibration


@dataclass(frozen=True, eq=False)
class Scores:
    """Per cent, and counts of images.

    Args:
        top1: of all images.
        macro_f1: mean over the classes that are in the labels or are predicted.
        recall: of each class; NaN for one of which there is no image.
        confusion: int64 ``[K, K]``; rows are true classes, columns predicted ones.
        classes: their names.
        calibration: of the probabilities, where there are any.
    """

    top1: float
    macro_f1: float
    recall: tuple[float, ...]
    confusion: Tensor
    classes: tuple[str, ...]
    calibration: Calibration | None = None

    @property
    def images(self) -> int:
        """How many were predicted."""
        return int(self.confusion.sum())

    def __str__(self) -> str:
        known = self.calibration
        trusted = "" if known is None else f"AUROC {known.auroc:.2f} %, calibration error {known.error:.2f} %, "
        return f"top-1 {self.top1:.2f} %, macro F1 {self.macro_f1:.2f} %, {trusted}{self.images} images"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: of every class its recall, its number of images, and how many of them were taken for which."""
        classes = [
            {
                "name": name,
                "recall": recall,
                "images": sum(row),
                "predicted": {other: count for other, count in zip(self.classes, row, strict=True) if count},
            }
            for name, recall, row in zip(self.classes, self.recall, self.confusion.tolist(), strict=True)
        ]
        known = {} if self.calibration is None else self.calibration.as_dict()
        return {"top1": self.top1, "macro_f1": self.macro_f1, "images": self.images, **known, "classes": classes}


def score(predicted: Tensor, labels: Tensor, classes: Sequence[str], probabilities: Tensor | None = None) -> Scores:
    """Scores of predicted classes ``[N]`` against labels ``[N]``, both below K, of K named classes; with probabilities
    ``[N, K]``, their calibration too.

    Raises ValueError if there is no image, fewer than two classes, or the numbers do not fit.
    """
    from torchmetrics.functional import classification as metrics

    if predicted.shape != labels.shape or labels.dim() != 1 or not len(labels):
        shapes = f"{list(predicted.shape)} and {list(labels.shape)}"
        raise ValueError(f"expected predictions [N] and labels [N] of at least one image, got {shapes}")
    count, both = len(classes), torch.cat((predicted, labels))
    if count < 2 or int(both.min()) < 0 or int(both.max()) >= count:
        raise ValueError(f"expected numbers of {count} classes, of at least two, got {both.unique().tolist()[:10]}")
    confusion = metrics.multiclass_confusion_matrix(predicted, labels, count)
    recall = metrics.multiclass_recall(predicted, labels, count, average="none")
    recall = recall.where(confusion.sum(1) > 0, torch.nan)
    top1 = metrics.multiclass_accuracy(predicted, labels, count, average="micro")
    macro_f1 = metrics.multiclass_f1_score(predicted, labels, count, average="macro")
    percent = (float(100 * top1), float(100 * macro_f1), tuple((100 * recall).tolist()))
    if probabilities is None:
        return Scores(*percent, confusion, tuple(classes))
    if probabilities.shape != (len(labels), count):
        raise ValueError(f"expected probabilities [{len(labels)}, {count}], got {list(probabilities.shape)}")
    return Scores(*percent, confusion, tuple(classes), calibration(probabilities, labels))

"""How right the classes of pixels are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convnextv2.segmentation.masks import IGNORED

AT_ONCE = 2**22
"""Pixels that are counted at a time."""


@dataclass(frozen=True, eq=False)
class PixelScores:
    """Per cent, and counts of pixels, of all images together; pixels that are ignored do not count.

    Args:
        miou: mean of ``iou`` over the classes that are in the masks or are predicted.
        accuracy: of all pixels.
        iou: intersection over union of each class; NaN for one that is in neither.
        confusion: int64 ``[K, K]``; rows are true classes, columns predicted ones.
        classes: their names.
        images: how many there were.
    """

    miou: float
    accuracy: float
    iou: tuple[float, ...]
    confusion: Tensor
    classes: tuple[str, ...]
    images: int

    def __str__(self) -> str:
        return f"mIoU {self.miou:.2f} %, pixel accuracy {self.accuracy:.2f} %, {self.images} images"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: of every class its IoU, its pixels, and those that were predicted to be of it."""
        columns = zip(
            self.classes, self.iou, self.confusion.sum(1).tolist(), self.confusion.sum(0).tolist(), strict=True
        )
        classes = [
            {"name": name, "iou": iou, "pixels": pixels, "predicted": predicted}
            for name, iou, pixels, predicted in columns
        ]
        return {"miou": self.miou, "pixel_accuracy": self.accuracy, "images": self.images, "classes": classes}


def confusion_of(predicted: Tensor, mask: Tensor, classes: int) -> Tensor:
    """int64 ``[K, K]`` on the processor of maps ``[H, W]`` of classes, both uint8; ignored pixels of the mask are not
    counted."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    found = torch.zeros(classes, classes, dtype=torch.int64)
    rows = max(1, AT_ONCE // max(1, mask.shape[1]))
    for ours, theirs in zip(predicted.split(rows), mask.cpu().split(rows), strict=True):
        options: dict[str, Any] = {"ignore_index": IGNORED, "validate_args": False}
        found += multiclass_confusion_matrix(ours.long(), theirs.long(), classes, **options)
    return found


def pixel_scores(confusion: Tensor, classes: Sequence[str], images: int) -> PixelScores:
    """Scores of a confusion matrix ``[K, K]`` of pixels; ValueError if none was counted."""
    total = int(confusion.sum())
    if not total:
        raise ValueError(f"no pixel of {images} masks is of a class: all are ignored")
    right = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    iou = 100 * right / union  # NaN of 0 / 0
    miou = float(iou[union > 0].mean())
    return PixelScores(miou, float(100 * right.sum() / total), tuple(iou.tolist()), confusion, tuple(classes), images)

"""How far probabilities can be trusted: AUROC, calibration error, Brier score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 15
"""Of confidence, as in Guo et al. 2017 (On calibration of modern neural networks, section 2)."""


@dataclass(frozen=True)
class Bin:
    """Images of which the likeliest class has a probability between ``i / 15`` and ``(i + 1) / 15``.

    Args:
        confidence: its mean, in per cent; NaN without images, as ``accuracy``.
        accuracy: how many are right, in per cent.
        images: how many there are.
    """

    confidence: float
    accuracy: float
    images: int


@dataclass(frozen=True)
class Calibration:
    """Of the probabilities of N images.

    Args:
        auroc: mean over the classes of the area under the curve of one class against the rest, in per cent: how often
            an image of the class is given a higher probability of it than another one. Classes of which there is no
            image, or no other than of them, do not count; NaN if none counts.
        error: expected calibration error, in per cent: mean distance of confidence and accuracy over the images' bins.
        brier: mean squared distance of probabilities and truth, summed over the classes, from 0 to 2.
        bins: :data:`BINS` of them.
    """

    auroc: float
    error: float
    brier: float
    bins: tuple[Bin, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        bins = [vars(one) for one in self.bins]
        return {"auroc": self.auroc, "calibration_error": self.error, "brier": self.brier, "reliability": bins}


def calibration(probabilities: Tensor, labels: Tensor) -> Calibration:
    """What probabilities ``[N, K]`` are worth, whose rows add up to 1, against labels ``[N]`` below K.

    Raises ValueError if the shapes do not fit, there is no image, or a probability is not in [0, 1] or not finite.
    """
    from torchmetrics.functional import classification as metrics

    if probabilities.dim() != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        shapes = f"{list(probabilities.shape)} and {list(labels.shape)}"
        raise ValueError(f"expected probabilities [N, K] and labels [N] of at least one image, got {shapes}")
    classes = probabilities.shape[1]
    # The comparison is false for NaN. Beyond 1, by rounding, torchmetrics would take them for logits.
    if not bool(((probabilities > -1e-5) & (probabilities < 1 + 1e-5)).all()):
        raise ValueError("expected probabilities from 0 to 1; these are none, or not finite")
    probabilities = probabilities.float().clamp(0, 1 - 2**-24)  # 1 itself belongs to the last bin
    counts = labels.bincount(minlength=classes)
    counted = ((counts > 0) & (counts < len(labels))).nonzero().flatten().tolist()
    areas = [metrics.binary_auroc(probabilities[:, label], (labels == label).long()) for label in counted]
    auroc = float(100 * torch.stack(areas).mean()) if areas else float("nan")
    error = metrics.multiclass_calibration_error(probabilities, labels, classes, n_bins=BINS)
    true = probabilities.gather(1, labels[:, None]).squeeze(1)
    brier = float((probabilities.square().sum(1) - 2 * true + 1).mean())  # without a table of the truth
    return Calibration(auroc, float(100 * error), brier, _bins(probabilities, labels))


def _bins(probabilities: Tensor, labels: Tensor) -> tuple[Bin, ...]:
    confidence, predicted = probabilities.max(1)
    place = torch.bucketize(confidence, torch.linspace(0, 1, BINS + 1), right=True) - 1
    columns = torch.stack((confidence.double(), (predicted == labels).double()))
    sums = torch.zeros(2, BINS, dtype=torch.float64).index_add_(1, place, columns)
    counts = place.bincount(minlength=BINS)
    means = (100 * sums / counts).tolist()  # 0 / 0 is NaN
    return tuple(Bin(*one) for one in zip(*means, counts.tolist(), strict=True))

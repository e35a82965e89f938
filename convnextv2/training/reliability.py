"""A picture of how far a classifier's confidence can be trusted."""

from __future__ import annotations

import os

from convnextv2.evaluation.calibration import BINS, Calibration
from convnextv2.training.pictures import picture


def save_reliability(path: str | os.PathLike[str], found: Calibration) -> None:
    """Reliability diagram: accuracy against confidence in bins, and below it how many images each bin has.

    Bars below the diagonal are of a classifier that is surer than it is right. Raises OSError if the file cannot be
    written.
    """
    edges, width = [100 * number / BINS for number in range(BINS)], 100 / BINS
    images = sum(one.images for one in found.bins)
    with picture(path, 5, 6, "constrained") as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        filled = [(edge, one) for edge, one in zip(edges, found.bins, strict=True) if one.images]
        upper.bar(
            [edge for edge, _ in filled],
            [one.accuracy for _, one in filled],
            width,
            align="edge",
            color="C0",
            edgecolor="white",
            label="accuracy",
        )
        confidence = [one.confidence for _, one in filled]
        upper.plot(confidence, [one.accuracy for _, one in filled], "o", color="C1", ms=4, label="at mean confidence")
        upper.plot([0, 100], [0, 100], "--", color="gray", label="as sure as right")
        upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy, %")
        upper.set_title(f"calibration error {found.error:.1f} %, {images} images")
        upper.legend(loc="upper left", frameon=False)
        lower.bar(edges, [100 * one.images / images for one in found.bins], width, align="edge", color="C7", ec="white")
        lower.set(xlabel="confidence, %", ylabel="images, %")

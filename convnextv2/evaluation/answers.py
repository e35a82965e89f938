"""What a classifier answers on a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnextv2.data.datasets import PredictDataset
from convnextv2.evaluation.features import outputs_of
from convnextv2.evaluation.inference import Inference
from convnextv2.evaluation.prediction import Classifier


def class_probabilities(
    classifier: Classifier,
    images: PredictDataset,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    precision: str = "auto",
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[Tensor, list[int], list[tuple[Path, str]]]:
    """Probabilities float32 ``[N, K]`` and numbers of the readable images, and the others with reasons.

    Arguments as :func:`~convnextv2.evaluation.prediction.predict_images`.

    Raises:
        ValueError: if probabilities are not finite.
        DataError: if no image can be read.
    """
    inference = Inference(classifier.model, images, batch_size, precision=precision, compile=None)
    outputs, readable, unreadable = outputs_of(inference, images, workers, progress)
    probabilities = outputs.softmax(1)
    if not torch.isfinite(probabilities).all():
        raise ValueError(
            "probabilities are NaN or infinite; the training of the network diverged, or its weights are too large"
        )
    return probabilities, readable, unreadable

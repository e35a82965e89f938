"""What frozen features are worth: nearest neighbours and logistic regression, by scikit-learn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from convnextv2.data.datasets import ImageDataset
from convnextv2.models.encoder import Encoder

NEIGHBOURS, TEMPERATURE, BATCH = 20, 0.07, 64


class Features(NamedTuple):
    """Features ``[N, 2C]`` and labels ``[N]`` of N images."""

    values: NDArray[np.float32]
    labels: NDArray[np.int64]


@torch.no_grad()
def extract(encoder: Encoder, images: ImageDataset) -> Features:
    """Mean and standard deviation over the cells of the last stage, of each image without augmentation."""
    was_training, values, labels = encoder.training, [], []
    device = next(encoder.parameters()).device
    encoder.eval()
    try:
        for start in range(0, len(images), BATCH):
            loaded = [images.load(number) for number in range(start, min(start + BATCH, len(images)))]
            batch = torch.stack([images.plain_transform(decoded) for _, decoded in loaded]).to(device)
            cells = encoder.forward_features(batch).flatten(2).float()
            values.append(torch.cat([cells.mean(2), cells.std(2, correction=0)], 1).cpu().numpy())
            labels += [images.labels[found] for found, _ in loaded] if images.labels is not None else []
    finally:
        encoder.train(was_training)
    return Features(np.concatenate(values), np.asarray(labels))


def accuracy(measure: str, train: Features, val: Features) -> float:
    """Top-1 on ``val``, in per cent, by ``knn`` or ``linear``.

    Of 20 neighbours each has the vote exp(cosine similarity / 0.07), as in DINO; the regression is on standardised
    features, with scikit-learn's usual penalty.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count = min(NEIGHBOURS, len(train.labels))
    neighbours = KNeighborsClassifier(count, metric="cosine", weights=lambda distance: np.exp(-distance / TEMPERATURE))
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier = neighbours if measure == "knn" else regression
    return 100 * float(classifier.fit(train.values, train.labels).score(val.values, val.labels))

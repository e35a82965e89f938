"""What frozen features are worth: mean and standard deviation over the last stage's cells, without augmentation."""

from __future__ import annotations

from convnextv2.data.datasets import ImageDataset
from convnextv2.evaluation import Features, extract_features, fit_linear, knn_predict, linear_predict
from convnextv2.models.encoder import Encoder


def extract(encoder: Encoder, images: ImageDataset) -> Features:
    """Features ``[N, 2C]`` of all images, in this process."""
    return extract_features(encoder, images, pooling="mean_std", workers=0)


def accuracy(measure: str, train: Features, val: Features) -> float:
    """Top-1 on ``val``, in per cent, by ``knn`` or ``linear``, as ``scripts/evaluate.py`` has them."""
    knn = measure == "knn"
    predicted = knn_predict(train, val.values) if knn else linear_predict(fit_linear(train), val.values)
    return 100 * float((predicted == val.labels).double().mean())

"""Classification by the nearest neighbours among labelled features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convnextv2.evaluation.choices import NEIGHBOURS
from convnextv2.evaluation.features import Features

TEMPERATURE = 0.07
"""Of the votes, as in Wu et al. 2018 (Unsupervised feature learning via non-parametric instance discrimination,
section 3.4) and DINO."""
SIMILARITIES = 2**25
"""That are held at a time: 128 MiB."""


def knn_predict(train: Features, values: Tensor, *, k: int = NEIGHBOURS, device: str | torch.device = "cpu") -> Tensor:
    """Classes int64 ``[M]`` of features ``[M, F]``, those with the most of :func:`knn_votes`."""
    return knn_votes(train, values, k=k, device=device).argmax(1)


@torch.no_grad()
def knn_votes(train: Features, values: Tensor, *, k: int = NEIGHBOURS, device: str | torch.device = "cpu") -> Tensor:
    """Votes float32 ``[M, K]`` for each class of ``train``, by the ``k`` nearest neighbours of features ``[M, F]``.

    The nearest in cosine similarity ``s``; a neighbour votes for its class with weight ``exp(s / 0.07)``. Where there
    are fewer labelled features than ``k``, all of them vote. Memory is bounded by :data:`SIMILARITIES`, beside the
    features themselves and the votes. A row divided by its sum is what is said of confidence in the class.

    Raises ValueError if ``k`` is below 1, a label is missing, or the features are of different sizes.
    """
    check_features(train, values)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    labels = train.labels.to(device)
    references = F.normalize(train.values.to(device), dim=1).T
    classes = max(len(train.classes), int(labels.max()) + 1)
    nearest, found = min(k, len(train)), list[Tensor]()
    for queries in values.split(max(1, SIMILARITIES // len(train))):
        similarity, indices = (F.normalize(queries.to(device), dim=1) @ references).topk(nearest, dim=1)
        votes = similarity.new_zeros(len(queries), classes)
        votes.scatter_add_(1, labels[indices], (similarity / TEMPERATURE).exp())
        found.append(votes.cpu())
    return torch.cat(found)


def check_features(train: Features, values: Tensor) -> None:
    """Raise ValueError unless there are labelled features, and others of the same size."""
    if not len(train) or int(train.labels.min()) < 0:
        raise ValueError("expected features of labelled images to learn from; these have no labels")
    if values.dim() != 2 or values.shape[1] != train.values.shape[1]:
        raise ValueError(f"expected features [M, {train.values.shape[1]}], got {list(values.shape)}")

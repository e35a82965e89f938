"""A linear classifier on frozen features: scikit-learn's logistic regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convnextv2.evaluation.features import Features
from convnextv2.evaluation.knn import check_features

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline
else:
    Pipeline = Any  # importing it takes a second

GRID = (1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of the penalty to choose from."""
DEFAULT = 1e-1
FOLDS = 3
MOST_STEPS = 10_000


def fit_linear(train: Features, *, seed: int = 0) -> Pipeline:
    """Multinomial logistic regression on standardised features; its ``predict`` takes arrays ``[M, F]``.

    The penalty is chosen out of :data:`GRID` by accuracy in stratified cross-validation on these features alone, the
    standardisation included, in :data:`FOLDS` parts drawn by ``seed``. Where a class has fewer images than there are
    parts it is :data:`DEFAULT`. ``pipeline[-1].C`` says which it was.

    Raises ValueError if a label is missing, or all are the same.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_features(train, train.values)
    counts = train.labels.bincount()
    counts = counts[counts > 0]
    if len(counts) < 2:
        raise ValueError("a linear classifier needs images of at least two classes to learn from, got one")
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=DEFAULT, max_iter=MOST_STEPS))
    values, labels = train.values.double().numpy(), train.labels.numpy()
    if int(counts.min()) < FOLDS:
        return pipeline.fit(values, labels)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    search = GridSearchCV(pipeline, {"logisticregression__C": GRID}, scoring="accuracy", cv=folds)
    return search.fit(values, labels).best_estimator_


def linear_predict(pipeline: Pipeline, values: Tensor) -> Tensor:
    """Classes int64 ``[M]`` of features ``[M, F]``."""
    return torch.from_numpy(pipeline.predict(values.double().numpy()))


def linear_probabilities(pipeline: Pipeline, values: Tensor, classes: int) -> Tensor:
    """Probabilities float32 ``[M, classes]`` of features ``[M, F]``; 0 for a class that there was no image of."""
    found = torch.zeros(len(values), classes)
    found[:, torch.from_numpy(pipeline.classes_)] = torch.from_numpy(
        pipeline.predict_proba(values.double().numpy())
    ).float()
    return found

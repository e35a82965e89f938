"""A head to start from: logistic regression on the features that the encoder gives before it is trained."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset

from convnextv2.data.batches import Samples, memory_format
from convnextv2.data.datasets import ImageDataset
from convnextv2.data.loading import make_loader
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.pooling import maps_of
from convnextv2.training.processes import in_first_process

MOST_IMAGES = 20_000
"""Images that a head is fitted to, spread evenly over the training part where that has more."""
MANY = 5_000
"""Images from which on the strength is chosen on one part held out, instead of five."""
SHARE = 5
"""Of so many images one is held out then."""
STRENGTHS = tuple(10.0**power for power in range(-4, 2))
"""Inverse strengths of the regularisation to choose from, for features of unit variance."""
USUAL_STRENGTH = 0.01
"""Where too few classes have a second image to choose by."""


@dataclass(frozen=True)
class FittedHead:
    """Weights of a linear layer, and how they were found.

    Args:
        weight: float32 ``[K, C]``.
        bias: float32 ``[K]``.
        strength: the inverse strength of the regularisation.
        top1, loss: accuracy in per cent and cross entropy on parts held out; None where nothing was.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    strength: float
    top1: float | None = None
    loss: float | None = None


def fit_head(features_NC: NDArray[np.float32], labels_N: NDArray[np.int64], num_classes: int) -> FittedHead:
    """Multinomial logistic regression on standardised features; the head takes the features as they are.

    The strength of the regularisation is the one of least cross entropy on parts held out, so that probabilities, not
    the accuracy alone, are right on images that the head was not fitted to. A class without an image gets no
    weight, and the least bias. Raises ValueError with fewer than two classes.
    """
    from sklearn.exceptions import ConvergenceWarning

    classes, counts = np.unique(labels_N, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"`head_start` needs images of two classes, found {len(classes)}; leave it out")
    with warnings.catch_warnings():  # a fit that is nearly there is a start as good
        warnings.simplefilter("ignore", ConvergenceWarning)
        strength, top1, loss = _choose_strength(features_NC, labels_N, classes[counts > 1])
        scale, regression = fitted = _regression(strength)
        fitted.fit(features_NC, labels_N)
    found_KC, found_K = regression.coef_, regression.intercept_
    if len(classes) == 2:  # one row, of the second class against the first
        found_KC, found_K = np.concatenate([-found_KC, found_KC]) / 2, np.concatenate([-found_K, found_K]) / 2
    weight = np.zeros((num_classes, features_NC.shape[1]), np.float32)
    bias = np.full(num_classes, found_K.min(), np.float32)
    weight[classes] = found_KC / scale.scale_
    bias[classes] = found_K - weight[classes] @ scale.mean_
    return FittedHead(weight, bias, strength, top1, loss)


def start_head(model: ConvNeXtV2, images: ImageDataset, options: Any, device: torch.device) -> str:
    """Give the network the head that :func:`fit_head` finds on up to :data:`MOST_IMAGES` images without augmentation.

    The features are those that the head is given: pooled, and through the final norm as it is. For all processes of a
    run at once; the first one fits. Returns a line for the user.

    Args:
        model: put into evaluation mode; in the first process moved to ``device``.
        images: the training part.
        options: of the run: ``batch_size`` and ``workers``.
    """
    head: Any = model.eval().head

    def fit() -> tuple[FittedHead, int]:
        features, labels = frozen_features(model.to(device), images, options.batch_size, options.workers)
        return fit_head(features, labels, head.out_features), len(labels)

    found, count = in_first_process(fit)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(found.weight))
        head.bias.copy_(torch.from_numpy(found.bias))
    held_out = "" if found.loss is None else f"; held out: top-1 {found.top1:.2f} %, loss {found.loss:.4f}"
    return f"head start: logistic regression on {count} images, C {found.strength:g}{held_out}"


def frozen_features(
    model: ConvNeXtV2, images: ImageDataset, batch_size: int, workers: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pooled and normalised features ``[N, C]`` of up to :data:`MOST_IMAGES` images, not augmented, and their labels.

    ``model`` is in evaluation mode, on its device.
    """
    plain = replace(images, transform=images.plain_transform)
    plain.source, plain.damaged = images.source, images.damaged
    device = next(model.parameters()).device
    samples = Samples(plain, memory_format=memory_format(device, channels_last=True))
    chosen = np.unique(np.linspace(0, len(plain) - 1, min(len(plain), MOST_IMAGES)).round().astype(int)).tolist()
    features, labels = [], []
    with torch.no_grad():
        for pixels, numbers in make_loader(Subset(samples, chosen), batch_size, workers):
            finished, _ = samples.finish((pixels.to(device), numbers))
            maps = maps_of(model, finished, model.config.pooling)
            features.append(model.forward_head(maps, pre_logits=True).float().cpu())
            labels.append(numbers)
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def _regression(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-3, max_iter=200))


def _choose_strength(
    features_NC: NDArray[np.float32], labels_N: NDArray[np.int64], common: NDArray[np.int64]
) -> tuple[float, float | None, float | None]:
    """The strength, and accuracy and cross entropy with it, of ``common`` classes, which have two images or more.

    Where one part is held out, those are compared that are common enough for it to have an image of each.
    """
    from sklearn.model_selection import GridSearchCV, StratifiedKFold, StratifiedShuffleSplit

    kept = np.isin(labels_N, common)
    many = kept.sum() >= max(MANY, 10 * len(common))
    if many:
        classes, counts = np.unique(labels_N, return_counts=True)
        common = classes[counts >= SHARE]
        kept = np.isin(labels_N, common)
    if len(common) < 2:
        return USUAL_STRENGTH, None, None
    features_NC, labels_N = features_NC[kept], labels_N[kept]
    folds = min(5, np.unique(labels_N, return_counts=True)[1].min())
    held_out = StratifiedShuffleSplit(1, test_size=1 / SHARE, random_state=0)
    in_parts = StratifiedKFold(folds, shuffle=True, random_state=0)
    search = GridSearchCV(
        _regression(1.0),
        {"logisticregression__C": STRENGTHS},
        scoring=("neg_log_loss", "accuracy"),
        cv=held_out if many else in_parts,
        refit=False,
    )
    results = search.fit(features_NC, labels_N).cv_results_
    best = int(results["mean_test_neg_log_loss"].argmax())
    top1, loss = results["mean_test_accuracy"][best], -results["mean_test_neg_log_loss"][best]
    return STRENGTHS[best], 100 * float(top1), float(loss)

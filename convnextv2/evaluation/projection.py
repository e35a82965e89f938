"""Features as points of a plane."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from convnextv2.evaluation.choices import METHODS

LEAST = {"pca": 2, "umap": 5}
"""Images that a map takes."""


@dataclass(frozen=True, eq=False)
class Projection:
    """Points ``[N, 2]``, and what the two axes are."""

    points: NDArray[np.float32]
    axes: tuple[str, str]


def why_no_map(method: str) -> str | None:
    """What is missing for a method of :data:`METHODS`, and how it is got; None if nothing is."""
    if method == "umap" and importlib.util.find_spec("umap") is None:
        return "a map by umap needs umap-learn; install with: pip install umap-learn, or take pca, which is here"
    return None


def project(values: Tensor, method: str = "pca", *, seed: int = 0) -> Projection:
    """Features ``[N, F]`` in two dimensions.

    Args:
        method: ``pca``: the two principal components of scikit-learn, with the shares of the variance that they
            explain; ``umap``: umap-learn's, by cosine distance and 15 neighbours, whose axes mean nothing.
        seed: of what is drawn.

    Raises:
        ValueError: if there is no such method, umap-learn is missing, or there are too few images.
    """
    if method not in METHODS:
        raise ValueError(f"a map is made by {' or '.join(METHODS)}, got {method!r}")
    features = values.numpy().astype(np.float32)
    if len(features) < LEAST[method]:
        raise ValueError(f"a map by {method} takes {LEAST[method]} images or more, got {len(features)}")
    if reason := why_no_map(method):
        raise ValueError(reason)
    if method == "umap":
        from umap import UMAP

        count = len(features)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a seed means one thread
            start = "spectral" if count > 10 else "random"  # of so few there is no spectrum
            made = UMAP(n_neighbors=min(15, count - 1), metric="cosine", random_state=seed, init=start)
            return Projection(made.fit_transform(features), ("UMAP 1", "UMAP 2"))
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # features that are all alike explain nothing
        pca = PCA(min(2, features.shape[1]), random_state=seed)
        points = pca.fit_transform(features)
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    shares = [*np.nan_to_num(pca.explained_variance_ratio_), 0.0][:2]
    first, second = (f"component {number}, {share:.1%} of the variance" for number, share in enumerate(shares, 1))
    return Projection(points, (first, second))

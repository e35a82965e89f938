"""Maps of features."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from convnextv2.evaluation.projection import project, why_no_map


def test_principal_components_and_what_they_explain() -> None:
    rotation, _ = torch.linalg.qr(torch.randn(5, 5))
    values = torch.randn(400, 5) * torch.tensor([6.0, 3.0, 1.0, 0.5, 0.1]) @ rotation + 7
    made = project(values)
    centred = (values - values.mean(0)).double()
    _, scales, axes = torch.linalg.svd(centred, full_matrices=False)
    expected = (centred @ axes[:2].T).numpy()
    signs = np.sign((made.points * expected).sum(0))
    np.testing.assert_allclose(made.points * signs, expected, rtol=0, atol=2e-4 * float(scales[0]))
    share = (scales**2 / (scales**2).sum()).tolist()
    assert made.axes == tuple(f"component {n}, {share[n - 1]:.1%} of the variance" for n in (1, 2))
    assert np.array_equal(project(values).points, made.points)


@pytest.mark.parametrize("values", [torch.ones(4, 3), torch.zeros(2, 1), torch.randn(3, 1), torch.randn(2, 9)])
def test_features_of_few_numbers(values: torch.Tensor) -> None:
    made = project(values)
    assert made.points.shape == (len(values), 2)
    assert np.isfinite(made.points).all()
    assert "nan" not in " ".join(made.axes)


def test_what_umap_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own compiler takes a minute, so somebody stands in for it."""
    asked: list[dict[str, Any]] = []

    class Umap:
        def __init__(self, **options: Any) -> None:
            asked.append(options)

        def fit_transform(self, values: Any) -> Any:
            assert values.dtype == np.float32
            return values[:, :2] + 1

    module = types.ModuleType("umap")
    vars(module)["UMAP"] = Umap
    module.__spec__ = importlib.machinery.ModuleSpec("umap", None)
    monkeypatch.setitem(sys.modules, "umap", module)
    values = torch.randn(40, 3)
    made = project(values, "umap", seed=3)
    assert made.axes == ("UMAP 1", "UMAP 2")
    assert np.array_equal(made.points, values[:, :2].numpy() + 1)
    project(values[:5], "umap")
    first, second = ({"n_neighbors": n, "metric": "cosine", "random_state": r} for n, r in ((15, 3), (4, 0)))
    assert asked == [{**first, "init": "spectral"}, {**second, "init": "random"}]


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="a map is made by pca or umap, got 'tsne'"):
        project(torch.ones(4, 3), "tsne")
    with pytest.raises(ValueError, match="a map by pca takes 2 images or more, got 1"):
        project(torch.ones(1, 3))
    with pytest.raises(ValueError, match="a map by umap takes 5 images or more, got 4"):
        project(torch.ones(4, 3), "umap")
    found = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "umap" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert why_no_map("pca") is None
    with pytest.raises(ValueError, match="pip install umap-learn, or take pca"):
        project(torch.ones(9, 3), "umap")

"""Which features are alike: nearest neighbours among all, and images that are far from theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from convnextv2.evaluation.choices import OUTLIER_NEIGHBOURS
from convnextv2.evaluation.knn import SIMILARITIES


def unit(features: Tensor) -> Tensor:
    """Features ``[N, F]`` of length 1; what is not finite is taken for 0."""
    return normalize(features.nan_to_num(0, 0, 0), dim=1)


def nearest(features: Tensor, queries: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and numbers ``[Q, count]`` of the nearest of features ``[N, F]`` to some of them, without
    these themselves; fewer where there are not so many. What is not finite is taken for 0."""
    return _nearest(unit(features), torch.as_tensor(list(queries)), min(count, len(features) - 1))


@torch.no_grad()
def all_nearest(
    features: Tensor,
    count: int,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[Tensor, Tensor]:
    """:func:`nearest` of every one of features ``[N, F]``, ``[N, count]`` each, on the processor.

    All are compared with all: 2·N²·F operations, of which no more than
    :data:`~convnextv2.evaluation.knn.SIMILARITIES` numbers are held at a time.

    Raises ValueError unless there are two images and ``count`` is at least 1.
    """
    if len(features) < 2 or count < 1:
        raise ValueError(f"expected two images or more and one neighbour or more, got {len(features)} and {count}")
    own, count = unit(features.to(device)), min(count, len(features) - 1)
    blocks = torch.arange(len(features)).split(max(1, SIMILARITIES // len(features)))
    found = [tuple(part.cpu() for part in _nearest(own, block, count)) for block in progress(blocks)]
    return torch.cat([values for values, _ in found]), torch.cat([numbers for _, numbers in found])


def _nearest(own: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    queries = queries.to(own.device)
    similarity = own[queries] @ own.T
    similarity[torch.arange(len(queries), device=own.device), queries] = -torch.inf
    found = similarity.topk(count, dim=1)
    return found.values, found.indices


def distances(similarities: Tensor) -> Tensor:
    """How far out images are, ``[N]``: 1 minus the mean cosine similarity ``[N, k]`` to their nearest neighbours."""
    return 1 - similarities[:, :OUTLIER_NEIGHBOURS].double().mean(1)


def farthest(similarities: Tensor, count: int) -> list[int]:
    """Numbers of the ``count`` images with the largest :func:`distances`, the farthest first."""
    return distances(similarities).argsort(descending=True, stable=True)[:count].tolist()

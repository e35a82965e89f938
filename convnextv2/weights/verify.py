"""Does a converted encoder compute what its source computed? Answered by running both, in float64.

Where a layout names a network of its own (:mod:`convnextv2.weights.evaluators`), it runs on
the weights as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convnextv2.models.encoder import Encoder
from convnextv2.weights.layouts import get_layout
from convnextv2.weights.reading import Weights, read_weights
from sparse_ops.active_set import ActiveSet
from sparse_ops.oracle import MaskedDenseGrid
from sparse_ops.sparse_grid import SparseGrid

TOLERANCE = 2**16 * torch.finfo(torch.float64).eps
"""Largest error allowed, relative to the largest feature: 16 bits of float64's 52 are left to rounding, about 1.5e-11.

A single tap in the wrong place costs many orders of magnitude more.
"""

PATCHES = 3
"""Patches a side of the random image."""


@dataclass(frozen=True)
class Verification:
    """Errors relative to the largest feature, over every visible cell and channel of the last stage."""

    masked: float
    """Sparse encoder against the dense network re-masked at each depthwise convolution."""
    unmasked: float
    """Sparse encoder against the dense network, nothing masked."""
    foreign: float | None = None
    """Networks of other projects against the sparse encoder, nothing masked; None where no layout has one."""
    whose: tuple[str, ...] = ()
    """The layouts of those networks."""

    @property
    def largest(self) -> float:
        """The largest of the errors; NaN where a comparison gave NaN."""
        errors = [error for error in (self.masked, self.unmasked, self.foreign) if error is not None]
        return float(np.max(errors))  # NaN where one is, unlike max()

    @property
    def passed(self) -> bool:
        """Whether the largest error is within :data:`TOLERANCE`."""
        return self.largest <= TOLERANCE

    def __str__(self) -> str:
        whose = " and ".join(f"{name}'s network" for name in self.whose)
        foreign = "" if self.foreign is None else f", {whose} {self.foreign:.1e}"
        return (
            f"largest relative error {self.largest:.1e} (random mask {self.masked:.1e}, nothing masked "
            f"{self.unmasked:.1e}{foreign}; float64, tolerance {TOLERANCE:.1e})"
        )


def _encoder(weights: Weights) -> Encoder:
    with torch.device("meta"):
        encoder = Encoder(weights.config)
    encoder.load_state_dict({name: value.double() for name, value in weights.encoder.items()}, assign=True)
    return encoder.eval()


def _sparse_features(weights: Weights) -> Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]:
    """Our sparse encoder as a layout's ``sparse_features``."""
    encoder = _encoder(weights)
    return lambda _, images, visible: encoder(images, SparseGrid(ActiveSet.from_mask(~visible), "reference"))


def _relative(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.nan
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale)


@torch.no_grad()
def verify_conversion(source: Mapping[str, Tensor], written: Mapping[str, Tensor], seed: int = 0) -> Verification:
    """Run the sparse encoder and the dense network of a conversion on random images and masks.

    The sparse side runs the source as it was read, the dense side what is about to be written; where only the layout
    that is written has a sparse network of its own, the other way round. A layout's own networks run in place of, or
    beside, ours. Raises CheckpointError if either is not a whole encoder, or if the network that users load the layout
    into does not take ``written``.
    """
    states = (source, written)
    weights = [read_weights(state) for state in states]
    layouts = [get_layout(own.layout) for own in weights]
    config = weights[0].config
    if weights[1].config != config:
        return Verification(math.nan, math.nan)
    layouts[1].loading(written, config, "")
    sparse = 1 if layouts[0].sparse_features is None and layouts[1].sparse_features is not None else 0
    dense_encoder = _encoder(weights[1 - sparse])
    sparse_features = layouts[sparse].sparse_features or _sparse_features(weights[sparse])

    generator = torch.Generator().manual_seed(seed)
    size = PATCHES * config.patch_size
    images = torch.randn(2, config.in_chans, size, size, generator=generator, dtype=torch.float64)
    visible = torch.rand(2, PATCHES, PATCHES, generator=generator) < 0.45
    visible[:, 1, 1] = True

    masked_dense = dense_encoder(images, MaskedDenseGrid(visible, dtype=torch.float64)).permute(0, 2, 3, 1)
    full = sparse_features(states[sparse], images, torch.ones_like(visible))

    def error(features: Tensor) -> float:
        return _relative(features.permute(0, 2, 3, 1).flatten(0, 2), full)

    foreign = [
        (layout.name, error(layout.dense_features(state, config, images)))
        for layout, state in zip(layouts, states, strict=True)
        if layout.dense_features is not None
    ]
    return Verification(
        _relative(masked_dense[visible], sparse_features(states[sparse], images, visible)),
        error(dense_encoder(images)),
        float(np.max([largest for _, largest in foreign])) if foreign else None,
        tuple(dict(foreign)),
    )

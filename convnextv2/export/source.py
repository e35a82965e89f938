"""What is exported, and the check of what was written against the network it was written from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convnextv2.data.transforms import DEFAULT_STATISTICS, Preprocessing
from convnextv2.export.refusal import ExportError
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import FCMAEConfig
from convnextv2.models.encoder import Encoder
from convnextv2.weights.checkpoint import Checkpoint
from convnextv2.weights.reading import Weights, read_checkpoint
from convnextv2.weights.stated import classifier_config, stated_names

MARK = "sparse-fcmae"
"""What tells a file or folder that was written here."""
TOLERANCE = 1e-5
"""Largest difference allowed between the float32 outputs of what was written and ours in float64, relative to the
largest output."""

Run = Callable[[Tensor], Tensor]
"""Images ``[B, C, H, W]`` of float32 to the outputs of what was written, read back from where it lies."""


@dataclass(frozen=True)
class Source:
    """A dense network on its way into another format.

    Args:
        network: float32, on a processor, on torch's operators, in evaluation mode: an encoder, or a classifier.
        preprocessing: mean, standard deviation and size of its images; None where they are not known.
        class_names: of its outputs, or empty.
        metadata: what else was said about the weights, JSON values.
    """

    network: Encoder
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 without one."""
        return self.network.config.num_classes if isinstance(self.network, ConvNeXtV2) else 0

    @property
    def output(self) -> str:
        """Name of the output: ``logits`` ``[B, classes]``; without a head ``features``, ``[B, C]`` pooled and
        normalised where there is a final norm, else the last stage's ``[B, C, h, w]``."""
        return "logits" if self.num_classes else "features"

    @property
    def gives(self) -> str:
        """The output's name and shape, for messages."""
        channels = self.network.encoder_config.dims[-1]
        if self.num_classes:
            return f"logits [B, {self.num_classes}]"
        return (
            f"features [B, {channels}]" if isinstance(self.network, ConvNeXtV2) else f"features [B, {channels}, h, w]"
        )

    def about(self) -> dict[str, Any]:
        """All that a file should say beside its weights, JSON values."""
        stated = dict(self.metadata)
        if self.preprocessing is not None:
            mean, std, img_size = map(list, self.preprocessing)
            stated |= {"mean": mean, "std": std, "img_size": img_size}
        return stated | ({"class_names": list(self.class_names)} if self.class_names else {})


def source_of(checkpoint: Checkpoint, weights: Weights | None = None) -> Source:
    """The dense network of a checkpoint, or of ``weights`` in place of its own, with what it says about them.

    Raises CheckpointError if it does not hold a whole encoder, or says what cannot be.
    """
    weights = read_checkpoint(checkpoint) if weights is None else weights
    network: Encoder = Encoder(weights.config)
    if weights.head:
        network = ConvNeXtV2(classifier_config(weights.config, weights.head), "torch")
    network.backend = "torch"
    missing = network.load_state_dict({**weights.encoder, **weights.head}, strict=not weights.head)
    assert all(name.startswith("head.") for name in missing.missing_keys) and not missing.unexpected_keys
    stated, channels = checkpoint.config, weights.config.in_chans
    size = stated.img_size if isinstance(stated, FCMAEConfig) else (224, 224)
    known = channels in DEFAULT_STATISTICS or {"mean", "std"} <= checkpoint.metadata.keys()
    metadata = {key: value for key, value in checkpoint.metadata.items() if key not in ("weights", "layout")}
    return Source(
        network.eval().float(),
        checkpoint.preprocessing(channels, size) if known else None,
        stated_names(stated, weights.num_classes),
        {**metadata, "converted_from": weights.layout},
    )


@torch.no_grad()
def largest_difference(source: Source, run: Run, seed: int = 0) -> float:
    """Largest difference of ``run``'s outputs from the network's in float64, relative to its largest output, over
    random images of three batch sizes and shapes; NaN where an output is, or has another shape."""
    exact = deepcopy(source.network).double()
    config = source.network.encoder_config
    generator, side, worst = torch.Generator().manual_seed(seed), config.patch_size, 0.0
    for batch, height, width in ((2, 2 * side, 3 * side), (1, 3 * side + 1, 2 * side), (3, 4 * side - 1, 2 * side + 3)):
        images = torch.randn(batch, config.in_chans, height, width, generator=generator)
        expected, actual = exact(images.double()), run(images).double()
        if actual.shape != expected.shape or not actual.isfinite().all():
            return math.nan
        scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        worst = max(worst, float((actual - expected).abs().max() / scale))
    return worst


def check_written(source: Source, run: Run, seed: int = 0) -> str:
    """What :func:`largest_difference` found, in words; ExportError if it is more than :data:`TOLERANCE`."""
    worst = largest_difference(source, run, seed)
    told = f"largest relative difference {worst:.1e} (three batch and image sizes, float32, tolerance {TOLERANCE:.0e})"
    if not worst <= TOLERANCE:
        raise ExportError(f"what was written computes something else, so it was removed: {told}")
    return told

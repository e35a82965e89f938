"""The checkpoints that the authors of ConvNeXt V2 published, as data, and their download.

The weights are under CC-BY-NC 4.0: not for commercial use. That licence is theirs, not this project's.
"""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from convnextv2.weights.download import cached

BASE_URL = "https://dl.fbaipublicfiles.com/convnext/convnextv2/"
LICENCE = "CC-BY-NC 4.0"

Kind = Literal["fcmae", "1k", "22k"]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedCheckpoint:
    """One published file.

    Args:
        variant: the network, ``convnextv2_atto`` … ``convnextv2_huge``.
        kind: ``fcmae``: pre-trained encoder without final norm and head; ``1k``: then fine-tuned on ImageNet-1K;
            ``22k``: fine-tuned on ImageNet-22K and then on ImageNet-1K.
        resolution: pixels a side of the training images.
        parameters: of the classifier, in millions, as published.
        flops: multiply-adds an image in billions, as published; None for encoders.
        top1: ImageNet-1K validation accuracy in per cent, as published; None for encoders.
    """

    variant: str
    kind: Kind
    resolution: int
    parameters: float
    flops: float | None = None
    top1: float | None = None

    @property
    def path(self) -> str:
        """Path below :data:`BASE_URL`."""
        if self.kind == "fcmae":
            return f"pt_only/{self.variant}_1k_{self.resolution}_fcmae.pt"
        return f"im{self.kind}/{self.variant}_{self.kind}_{self.resolution}_ema.pt"

    @property
    def name(self) -> str:
        """Name in :data:`PUBLISHED`, ``convnextv2_atto_1k_224_fcmae`` for example: the file's, without suffix."""
        return Path(self.path).stem

    @property
    def url(self) -> str:
        """Address of the file."""
        return BASE_URL + self.path


# variant, millions of parameters, then (kind, resolution, FLOPs, top-1) of the classifiers
_TABLE: tuple[tuple[str, float, tuple[tuple[Kind, int, float, float], ...]], ...] = (
    ("atto", 3.7, (("1k", 224, 0.55, 76.7),)),
    ("femto", 5.2, (("1k", 224, 0.78, 78.5),)),
    ("pico", 9.1, (("1k", 224, 1.37, 80.3),)),
    ("nano", 15.6, (("1k", 224, 2.45, 81.9), ("22k", 224, 2.45, 82.1), ("22k", 384, 7.21, 83.4))),
    ("tiny", 28.6, (("1k", 224, 4.47, 83.0), ("22k", 224, 4.47, 83.9), ("22k", 384, 13.1, 85.1))),
    ("base", 89.0, (("1k", 224, 15.4, 84.9), ("22k", 224, 15.4, 86.8), ("22k", 384, 45.2, 87.7))),
    ("large", 198.0, (("1k", 224, 34.4, 85.8), ("22k", 224, 34.4, 87.3), ("22k", 384, 101.1, 88.2))),
    ("huge", 660.0, (("1k", 224, 115.0, 86.3), ("22k", 384, 337.9, 88.7), ("22k", 512, 600.8, 88.9))),
)

_FILES = [PublishedCheckpoint(f"convnextv2_{name}", "fcmae", 224, size) for name, size, _ in _TABLE] + [
    PublishedCheckpoint(f"convnextv2_{name}", kind, resolution, size, flops, top1)
    for name, size, rows in _TABLE
    for kind, resolution, flops, top1 in rows
]

PUBLISHED = {file.name: file for file in sorted(_FILES, key=lambda file: ("fcmae", "1k", "22k").index(file.kind))}
"""The 26 published checkpoints by name."""


def get(name: str) -> PublishedCheckpoint:
    """The published checkpoint of that name; ValueError, with the nearest, if there is none."""
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, 1)
        advice = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(PUBLISHED)}"
        raise ValueError(f"no published checkpoint {name!r}; {advice}")
    return PUBLISHED[name]


def place_of(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Where :func:`fetch` keeps a published checkpoint, whether or not it is there; ValueError as :func:`get`."""
    return (Path(torch.hub.get_dir()) / "checkpoints" if folder is None else Path(folder)) / Path(get(name).path).name


def fetch(
    name: str, progress: bool = True, *, folder: str | os.PathLike[str] | None = None, mirror: str | None = None
) -> Path:
    """The file of a published checkpoint, downloaded into torch's hub cache or ``folder`` unless it is there, whole.

    The licence of the weights (:data:`LICENCE`) is logged as a warning with each use. ``mirror``, or else
    ``CONVNEXTV2_MIRROR`` in the environment, stands for :data:`BASE_URL`. What counts as whole:
    :func:`~convnextv2.weights.download.cached`.

    Raises:
        ValueError: if there is no such checkpoint.
        CheckpointError: if it cannot be downloaded whole.
        OSError: if the cache cannot be read or written.
    """
    file, target = get(name), place_of(name, folder)
    _logger.warning("%s: the published weights are under %s, not for commercial use", file.name, LICENCE)
    base = mirror or os.environ.get("CONVNEXTV2_MIRROR") or BASE_URL
    return cached(f"{base.rstrip('/')}/{file.path}", target, progress)

"""The sizes that the authors of ConvNeXt V2 published, beside ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import VARIANTS, ClassifierConfig, EncoderConfig, encoder_config, variant_name
from convnextv2.models.summary import layers
from convnextv2.weights.zoo import PUBLISHED, PublishedCheckpoint

CLASSES = 1000
"""Of the published classifiers."""


@dataclass(frozen=True)
class Beside:
    """A published checkpoint, and the same network here: 1,000 classes, three channels, patches of 32 pixels.

    Args:
        file: as published; its ``flops`` count a multiply-add once.
        parameters, multiply_adds: of our classifier, for one image of that resolution.
    """

    file: PublishedCheckpoint
    parameters: int
    multiply_adds: int

    @property
    def same_parameters(self) -> bool:
        """Whether the parameters are the published ones, to the digits that were printed."""
        digits = len(f"{self.file.parameters:g}".partition(".")[2])
        return round(self.parameters / 1e6, digits) == self.file.parameters

    @property
    def difference(self) -> float | None:
        """Of the multiply-adds, relative to the published ones, which have two to four digits; None for encoders."""
        return None if self.file.flops is None else self.multiply_adds / 1e9 / self.file.flops - 1


def published_of(config: EncoderConfig) -> list[PublishedCheckpoint]:
    """The published classifiers that are of this encoder, one for each resolution; none for another patch size, other
    channels or a shape of one's own."""
    name = variant_name(config)
    if name is None or config != encoder_config(name, drop_path_rate=config.drop_path_rate):
        return []
    files = [file for file in PUBLISHED.values() if file.variant == name and file.flops is not None]
    return list({file.resolution: file for file in reversed(files)}.values())[::-1]


def beside(file: PublishedCheckpoint) -> Beside:
    """Our classifier of the same size, measured on torch's meta device: it takes no memory and little time."""
    assert file.variant in VARIANTS
    with torch.device("meta"):
        model = ConvNeXtV2(ClassifierConfig(encoder_config(file.variant), CLASSES), "torch")
    rows = layers(model, (file.resolution, file.resolution))
    return Beside(file, sum(row.parameters for row in rows), sum(row.multiply_adds for row in rows))

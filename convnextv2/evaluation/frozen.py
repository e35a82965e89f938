"""The encoder of any checkpoint, and how its images are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from convnextv2.data.build import build_finetune_datasets
from convnextv2.data.datasets import ImageDataset
from convnextv2.data.decoding import USUAL
from convnextv2.data.reading import as_trained
from convnextv2.models.config import FCMAEConfig, check_image_size
from convnextv2.models.encoder import Encoder
from convnextv2.weights.checkpoint import Checkpoint, as_checkpoint
from convnextv2.weights.loading import load_strict
from convnextv2.weights.reading import read_checkpoint, weights_config


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder in evaluation mode, and how its images are prepared: mean, std, (H, W), and what its checkpoint says
    about how they are read."""

    model: Encoder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    img_size: tuple[int, int]
    reading: Mapping[str, Any] = field(default_factory=dict)

    def datasets(self, data: str | Path, **options: Any) -> tuple[ImageDataset, ImageDataset]:
        """Training and validation part of labelled images; ``options`` and errors as
        :func:`~convnextv2.data.build.build_finetune_datasets`, so a fine-tuning with the same has the same parts."""
        prepared = self.img_size, self.model.encoder_config.in_chans
        options["wanted"] = as_trained(options.get("wanted", USUAL), self.reading)
        return build_finetune_datasets(data, *prepared, mean=self.mean, std=self.std, **options)


def load_encoder(
    checkpoint: Checkpoint | str | Path,
    *,
    device: str | torch.device = "cpu",
    img_size: tuple[int, int] | None = None,
    untrained: int | None = None,
) -> FrozenEncoder:
    """The encoder of a checkpoint of any layout, whether or not it has a decoder or a head.

    Args:
        checkpoint: one that is loaded, or its path, or a run folder.
        img_size: (H, W) in pixels; None takes the checkpoint's.
        untrained: seed of random weights to take instead of the checkpoint's, all else being equal: what training has
            to beat.

    Raises:
        CheckpointError: if the checkpoint cannot be read.
        ValueError: if its metadata is malformed, or the size is below the patch size.
    """
    checkpoint = as_checkpoint(checkpoint)
    weights = read_checkpoint(checkpoint)
    config = checkpoint.config or weights_config(weights)
    default = config.img_size if isinstance(config, FCMAEConfig) else (224, 224)
    mean, std, own_size = checkpoint.preprocessing(weights.config.in_chans, default)
    check_image_size(img_size or own_size, weights.config.patch_size, dense=True)
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(untrained or 0)
        model = Encoder(weights.config)
    if untrained is None:
        load_strict(model, weights.encoder, checkpoint.path)
    return FrozenEncoder(model.to(device).eval(), mean, std, img_size or own_size, checkpoint.metadata)

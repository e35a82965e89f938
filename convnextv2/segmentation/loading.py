"""Weights into networks for segmentation, and whole networks from their checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from convnextv2.data.decoding import Wanted
from convnextv2.data.reading import as_trained, display_ranges
from convnextv2.data.transforms import Statistics
from convnextv2.models.config import check_image_size
from convnextv2.segmentation.config import SegmenterConfig
from convnextv2.segmentation.masks import Classes, classes_from
from convnextv2.segmentation.network import Segmenter
from convnextv2.weights.adapting import read_for
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError, as_checkpoint, load_checkpoint
from convnextv2.weights.loading import load_strict
from convnextv2.weights.reading import read_checkpoint

ENCODER = "encoder."


def segmenter_config(checkpoint: Checkpoint) -> SegmenterConfig | None:
    """The configuration of a checkpoint that is of segmentation."""
    config: object = checkpoint.config
    return config if isinstance(config, SegmenterConfig) else None


def encoder_of(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of segmentation as one of its encoder alone; any other as it is."""
    if (config := segmenter_config(checkpoint)) is None:
        return checkpoint
    own = {
        name.removeprefix(ENCODER): value for name, value in checkpoint.state_dict.items() if name.startswith(ENCODER)
    }
    if not own:
        raise CheckpointError(f"{checkpoint.path}: says that it is of segmentation, and holds no encoder")
    return replace(checkpoint, state_dict=own, config=config.encoder)


def init_segmenter(
    model: Segmenter, checkpoint: Checkpoint | str | os.PathLike[str], *, bands: str | None = None
) -> str:
    """Start from the weights of a checkpoint of any layout; what was loaded and is new, in words.

    The whole encoder must be there. Of a checkpoint of segmentation the decoder is taken too, where it is of the same
    kind and width, and the last layer where its classes have the same names. A stem for other channels or another patch
    size is adapted, as :func:`~convnextv2.weights.adapting.read_for` does, which also takes ``bands``. Raises
    CheckpointError if the file cannot be read, or is of another variant.
    """
    checkpoint = as_checkpoint(checkpoint)
    weights, adapted = read_for(model.config.encoder, encoder_of(checkpoint), bands)
    taken, new = {f"{ENCODER}{name}": value for name, value in weights.encoder.items()}, ["decoder", "head"]
    state, there = model.state_dict(), segmenter_config(checkpoint)
    here = model.config
    if there is not None and _decoder(there) == _decoder(here):
        same = there.class_names == here.class_names
        taken |= {
            name: value
            for name, value in checkpoint.state_dict.items()
            if not name.startswith(ENCODER) and (same or not name.startswith("head."))
        }
        new = [] if same else ["head"]
    load_strict(model, {**state, **taken}, checkpoint.path)
    note = f"; {adapted}" if adapted else ""
    return f"{checkpoint.path}: {len(taken)} tensors loaded; freshly initialised: {', '.join(new) or 'nothing'}{note}"


def _decoder(config: SegmenterConfig) -> tuple[object, ...]:
    """What two decoders have in common whose weights fit: UNet has a block more above a stem of stride 4."""
    return config.decoder, config.decoder_width, config.decoder == "unet" and config.encoder.stem_stride == 4


@dataclass(frozen=True)
class LoadedSegmenter:
    """A network for prediction, in evaluation mode, and what its checkpoint says about images and masks.

    Args:
        window: (H, W) in pixels of the crops that it was trained on.
    """

    model: Segmenter
    classes: Classes
    statistics: Statistics
    window: tuple[int, int]
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def wanted(self, max_pixels: int) -> Wanted:
        """What is wanted of image files: to be read as those of the training were."""
        return as_trained(Wanted(max_pixels), self.metadata)

    @property
    def ranges(self) -> list[tuple[float, float]]:
        """Least and greatest value to show of each channel of images that are no photographs; empty for these."""
        native = self.metadata.get("pixels") == "native"
        return display_ranges(self.metadata, self.statistics) if native else []

    @property
    def in_chans(self) -> int:
        """Channels of its images."""
        return self.model.config.encoder.in_chans

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.model.head.weight.device


def load_segmenter(
    path: str | Path, *, device: str | torch.device = "cpu", window: tuple[int, int] | None = None
) -> LoadedSegmenter:
    """The network of a run of segmentation, rebuilt from the configuration in its file, all weights loaded strictly.

    Args:
        path: checkpoint, or run folder.
        window: (H, W) in pixels, multiples of the patch size; None takes the checkpoint's.

    Raises:
        CheckpointError: if the checkpoint cannot be read, or is of no segmentation.
        ValueError: if the window does not suit the network.
    """
    checkpoint = load_checkpoint(path)
    config = segmenter_config(checkpoint)
    if config is None:
        raise CheckpointError(f"{checkpoint.path}: is of no segmentation; train one from it with fcmae segment")
    read = read_checkpoint(encoder_of(checkpoint))  # compares the configuration with the weights before it is built
    head = checkpoint.state_dict.get("head.weight")
    if head is None or head.dim() != 4 or head.shape[0] != config.num_classes:
        raise CheckpointError(f"{checkpoint.path}: holds no head for the {config.num_classes} classes that it names")
    with torch.device("meta"):  # of the size that the configuration says, before memory is taken for it
        load_strict(Segmenter(config), {k: v.to("meta") for k, v in checkpoint.state_dict.items()}, checkpoint.path)
    model = Segmenter(config)
    state = {**checkpoint.state_dict, **{f"{ENCODER}{name}": value for name, value in read.encoder.items()}}
    load_strict(model, state, checkpoint.path)
    mean, std, size = checkpoint.preprocessing(config.encoder.in_chans)
    try:
        classes = classes_from(checkpoint.metadata, config.class_names)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    window = window or size
    check_image_size(window, config.encoder.patch_size)
    return LoadedSegmenter(model.to(device).eval(), classes, (mean, std), window, checkpoint.metadata)

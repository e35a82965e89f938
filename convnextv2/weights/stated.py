"""What a file says about its weights, against what it can mean and against the weights themselves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from convnextv2.data.metadata import IMAGE_METADATA, numbers_of
from convnextv2.models.config import ClassifierConfig, EncoderConfig, FCMAEConfig
from convnextv2.models.pooling import pooling_of
from convnextv2.weights.guard import CheckpointError, plain

Config = EncoderConfig | FCMAEConfig | ClassifierConfig
_HEAD_SIZES = ("decoder_depth", "decoder_dim", "num_classes", "pooling")


def classifier_config(encoder: EncoderConfig, head: Mapping[str, Tensor]) -> ClassifierConfig:
    """Configuration of a classifier with a final norm, and a head or none, of these shapes."""
    classes = head["head.weight"].shape[0] if "head.weight" in head else 0
    return ClassifierConfig(encoder, classes, pooling=pooling_of(head, encoder.dims))


def stated_names(config: Config | None, num_classes: int | None) -> tuple[str, ...]:
    """Names of the classes of a head with so many outputs (None: no head), where a configuration states as many."""
    names = config.class_names if isinstance(config, ClassifierConfig) else ()
    return names if len(names) == num_classes else ()


def stated_metadata(found: Any, config: Config | None) -> dict[str, Any]:
    """What a file says beside weights and configuration; of files of others only what JSON can hold, and no entry of a
    name of ours that stands for something else."""
    try:
        metadata = plain(found) if isinstance(found, Mapping) else {}
    except ValueError as error:
        if config is None:
            return {}
        raise CheckpointError(f"its metadata {error}") from error
    sizes = [{"img_size": config.img_size}] if isinstance(config, FCMAEConfig) else []
    for source, name in itertools.product((metadata, *sizes), IMAGE_METADATA):
        try:
            numbers_of(source, name)
        except ValueError:  # noqa: PERF203  # four entries
            if config is not None:
                raise
            del metadata[name]
    return metadata


def compare(config: Config, actual: Config) -> None:
    """Raise CheckpointError unless a configuration is of the shapes that the weights ``actual``ly have."""
    stated, found = _sizes(config), _sizes(actual)
    if wrong := [name for name in stated if stated[name] != found.get(name)]:
        said = "; ".join(f"{name} {_shown(stated[name])}, not {found.get(name, 'there')}" for name in wrong)
        raise CheckpointError(f"the weights are of another shape than the configuration says: {said}")


def _sizes(config: Config) -> dict[str, Any]:
    """What a configuration says about the shapes of the weights."""
    encoder = config if isinstance(config, EncoderConfig) else config.encoder
    sizes = {**asdict(replace(encoder, drop_path_rate=0.0))}
    return sizes | {name: getattr(config, name) for name in _HEAD_SIZES if hasattr(config, name)}


def _shown(value: Any) -> str:
    text = str(value) if not isinstance(value, int) or abs(value) < 10**20 else "a number of over 20 digits"
    return text if len(text) <= 60 else f"{text[:60]}…"

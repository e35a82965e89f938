"""Networks by name, with the weights of a checkpoint: the public ``create_model``, and a function for each variant."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from convnextv2.models import classifier
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import VARIANTS, ClassifierConfig, EncoderConfig, encoder_config, variant_name
from convnextv2.models.pooling import pooling_of
from convnextv2.weights.checkpoint import Checkpoint, load_checkpoint
from convnextv2.weights.loading import init_classifier
from convnextv2.weights.reading import Weights, read_checkpoint
from convnextv2.weights.zoo import PUBLISHED

_logger = logging.getLogger(__name__)


def default_weights(variant: str) -> str:
    """Name of the published checkpoint that ``pretrained=True`` stands for: the classifier of ImageNet-1K at 224
    pixels, the one kind that all eight sizes have, so that sizes compare.

    Raises:
        ValueError: if nothing was published for the variant.
    """
    name = f"{variant}_1k_224_ema"
    if name not in PUBLISHED:
        own = ", ".join(dict.fromkeys(file.variant for file in PUBLISHED.values()))
        raise ValueError(
            f"no weights were published for {variant!r}, only for {own}; give `pretrained` a path or a name"
        )
    return name


def create_model(
    name: str | EncoderConfig,
    *,
    pretrained: bool | str | os.PathLike[str] = False,
    num_classes: int | None = None,
    drop_path_rate: float = 0.0,
    in_chans: int | None = None,
    patch_size: int | None = None,
    head_init_scale: float = 1.0,
    backend: str = "auto",
) -> ConvNeXtV2:
    """Dense classifier of a variant, or of a custom :class:`~convnextv2.models.config.EncoderConfig`.

    Args:
        name: ``convnextv2_atto`` … ``convnextv2_huge``, a configuration, or, with ``pretrained=True``, the name of a
            published checkpoint, whose variant it is.
        pretrained: True for the published weights of the variant (:func:`default_weights`), or a checkpoint: what
            :func:`~convnextv2.weights.names.resolve_path` takes, names, addresses, paths. Its head is kept where it has
            ``num_classes`` outputs; else the head is fresh, which is logged as a warning.
        num_classes: outputs of the head; 0 for none. Left out: as many as the checkpoint's head has, else 1000.
        head_init_scale: of a fresh head, as :class:`~convnextv2.models.config.ClassifierConfig`.
        drop_path_rate: as ``EncoderConfig``; taken from a configuration where one is given.
        in_chans, patch_size: likewise; left out they are the checkpoint's, and 3 and 32 without one.
        backend: of the blocks on a processor: ``auto``, ``torch`` or ``cpu``, as :class:`ConvNeXtV2`.

    Raises:
        ValueError: if the name is unknown or an option is out of range.
        TypeError: if ``pretrained`` is of another type.
        CheckpointError: if the weights cannot be had, or are of another network.
        BackendUnavailableError: if the backend named cannot run here.
    """
    if not isinstance(pretrained, bool | str | os.PathLike):
        raise TypeError(f"`pretrained` must be True, False, a name or a path, got {pretrained!r:.60}")
    source = pretrained
    if isinstance(name, str) and name in PUBLISHED:
        if pretrained is not True:
            raise ValueError(
                f"{name!r} names weights: say `pretrained`=True, or name its network {PUBLISHED[name].variant!r}"
            )
        source, name = name, PUBLISHED[name].variant
    asked = {"in_chans": in_chans, "patch_size": patch_size}
    given: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    encoder = encoder_config(name, drop_path_rate=drop_path_rate, **given)
    if source is False:
        classes = 1000 if num_classes is None else num_classes
        return classifier.create_model(encoder, num_classes=classes, head_init_scale=head_init_scale, backend=backend)
    if isinstance(source, bool):
        source = default_weights(variant_name(encoder) or "a custom network")
    checkpoint = load_checkpoint(source)
    weights = read_checkpoint(checkpoint)
    if isinstance(name, str):
        own = {"in_chans": weights.config.in_chans, "patch_size": weights.config.patch_size}
        encoder = replace(encoder, **{**own, **given})
    return _from_checkpoint(checkpoint, weights, ClassifierConfig(encoder, 1, head_init_scale), num_classes, backend)


def _from_checkpoint(
    checkpoint: Checkpoint, weights: Weights, config: ClassifierConfig, num_classes: int | None, backend: str
) -> ConvNeXtV2:
    """The classifier with the checkpoint's weights, and with its head where that has as many outputs."""
    classes = (weights.num_classes or 1000) if num_classes is None else num_classes
    config = replace(config, num_classes=classes)
    if weights.head and classes in (0, weights.num_classes):
        names = getattr(checkpoint.config, "class_names", ()) if classes else ()
        config = replace(config, class_names=names, pooling=pooling_of(weights.head, weights.config.dims))
    model = ConvNeXtV2(config, backend)
    report = init_classifier(model, checkpoint)
    _logger.log(logging.WARNING if report.new else logging.INFO, "%s", report)
    return model


def _variant(name: str) -> Callable[..., ConvNeXtV2]:
    def build(**options: Any) -> ConvNeXtV2:
        return create_model(name, **options)

    depths, dims = VARIANTS[name]
    build.__module__, build.__name__, build.__qualname__ = "convnextv2", name, name
    build.__doc__ = f"Dense {name}: depths {depths}, widths {dims}. Options as in :func:`create_model`."
    return build


globals().update({name: _variant(name) for name in VARIANTS})  # ``convnextv2.convnextv2_atto`` …

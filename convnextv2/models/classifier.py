"""The dense classifier, and its factories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from convnextv2.models.config import VARIANTS, ClassifierConfig, EncoderConfig, encoder_config
from convnextv2.models.encoder import Encoder
from convnextv2.models.layers import EPS, init_weights
from convnextv2.models.pooling import POOLINGS, pool
from sparse_ops.map_grid import map_backend


class ConvNeXtV2(Encoder):
    """ConvNeXt V2 for classification: dense encoder, global average pooling, LayerNorm, linear head.

    Its state dict has the names and shapes of the official dense checkpoints. ``backend`` is what runs its blocks on a
    processor: ``auto`` for the best kernels there are, ``torch`` for torch's operators; :attr:`runs_on` says which.
    """

    def __init__(self, config: ClassifierConfig, backend: str = "auto") -> None:
        super().__init__(config.encoder)
        if backend != "auto":
            map_backend(backend)
        self.backend = backend
        self.config = config
        self.norm = nn.LayerNorm(config.encoder.dims[-1] * POOLINGS[config.pooling], eps=EPS)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(config.num_classes, config.head_init_scale)

    def reset_classifier(self, num_classes: int, head_init_scale: float = 1.0) -> None:
        """Replace the head by a new one for ``num_classes`` (0: none), its initial weights scaled."""
        self.head = nn.Linear(self.norm.weight.numel(), num_classes) if num_classes else nn.Identity()
        init_weights(self.head)
        if isinstance(self.head, nn.Linear):
            self.head.weight.data.mul_(head_init_scale)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """``[B, C, h, w]`` to logits ``[B, num_classes]``, or to the normalised pooled features ``[B, C or 2C]``."""
        pooled = self.norm(pool(features, self.config.pooling))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]  # a classifier is dense: it takes no grid
        """Logits ``[B, num_classes]`` of images ``[B, in_chans, H, W]``."""
        return self.forward_head(self.forward_features(images))


def create_model(
    name: str | EncoderConfig,
    *,
    num_classes: int = 1000,
    drop_path_rate: float = 0.0,
    in_chans: int = 3,
    patch_size: int = 32,
    head_init_scale: float = 1.0,
    backend: str = "auto",
) -> ConvNeXtV2:
    """Dense classifier of a published variant, or of a custom :class:`~convnextv2.models.config.EncoderConfig`.

    Args:
        name: ``convnextv2_atto`` … ``convnextv2_huge``, or a configuration.
        num_classes, head_init_scale: as :class:`~convnextv2.models.config.ClassifierConfig`.
        drop_path_rate, in_chans, patch_size: as ``EncoderConfig``; taken from a configuration where one is given.
        backend: of the blocks on a processor: ``auto``, ``torch`` or ``cpu``, as :class:`ConvNeXtV2`.

    Raises:
        ValueError: if the name is unknown or an option is out of range.
        BackendUnavailableError: if the backend named cannot run here.
    """
    encoder = encoder_config(name, drop_path_rate=drop_path_rate, in_chans=in_chans, patch_size=patch_size)
    return ConvNeXtV2(ClassifierConfig(encoder, num_classes, head_init_scale), backend)


def _variant(name: str) -> Callable[..., ConvNeXtV2]:
    def build(**options: Any) -> ConvNeXtV2:
        return create_model(name, **options)

    depths, dims = VARIANTS[name]
    build.__module__, build.__name__, build.__qualname__ = "convnextv2", name, name
    build.__doc__ = f"Dense {name}: depths {depths}, widths {dims}. Options as in :func:`create_model`."
    return build


FACTORIES = {name: _variant(name) for name in VARIANTS}
"""A function for each variant; the package has them under their names, ``convnextv2.convnextv2_atto`` …."""

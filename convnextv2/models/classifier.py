"""The dense classifier."""

from __future__ import annotations

from torch import Tensor, nn

from convnextv2.models.config import ClassifierConfig, EncoderConfig, encoder_config
from convnextv2.models.encoder import Encoder
from convnextv2.models.interface import ClassifierInterface, new_head
from convnextv2.models.layers import EPS
from convnextv2.models.pooling import Maps, maps_of, pool, pooled_width
from sparse_ops.map_grid import map_backend


class ConvNeXtV2(ClassifierInterface, Encoder):
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
        self.norm = nn.LayerNorm(pooled_width(config.encoder.dims, config.pooling), eps=EPS)
        self.head = new_head(self.norm, config)

    def forward_head(self, features: Maps, pre_logits: bool = False) -> Tensor:
        """``[B, C, h, w]``, or that of all stages, to logits ``[B, num_classes]``, or to normalised pooled features."""
        pooled = self.norm(pool(features, self.config.pooling))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]  # a classifier is dense: it takes no grid
        """Logits ``[B, num_classes]`` of images ``[B, in_chans, H, W]``."""
        return self.forward_head(maps_of(self, images, self.config.pooling))


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

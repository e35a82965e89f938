"""The dense encoder under a decoder of segmentation-models-pytorch: logits for every pixel.

The decoders there are written for maps of strides 2 to 32. They ask the sizes of the maps that they get, not their
strides, so the four maps of any patch size are handed to them: strides 4 to 32, 2 to 16, or 1 to 8.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convnextv2.models.encoder import Encoder
from convnextv2.segmentation.config import SegmenterConfig
from sparse_ops.map_grid import map_backend

GROUP = 8
"""Channels that are normalised together, so that a map of a single cell can be."""
LEAST_UNET = 16


def library() -> Any:
    """segmentation-models-pytorch; ValueError, with what to install, where it is missing."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ValueError(
            f"segmentation needs segmentation-models-pytorch: pip install 'sparse-fcmae[segment]' ({error})"
        ) from error
    return smp


class Segmenter(nn.Module):
    """ConvNeXt V2 with a decoder: logits of every class for every pixel.

    Maps of the decoder are normalised in groups, each image by itself, where the library has batch normalisation: an
    image's logits then depend on no other image of the batch, in training as in prediction.

    Args:
        backend: of the encoder's blocks on a processor, as of :class:`~convnextv2.models.classifier.ConvNeXtV2`.

    Raises:
        ValueError: if segmentation-models-pytorch is not installed.
    """

    def __init__(self, config: SegmenterConfig, backend: str = "auto") -> None:
        super().__init__()
        if backend != "auto":
            map_backend(backend)
        initialization = library().base.initialization
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.encoder.backend = backend
        self._full_map = config.decoder == "unet"
        self.norms = nn.ModuleList()
        if config.decoder != "upernet":  # which has them itself
            self.norms.extend(nn.LayerNorm(dim, eps=1e-6) for dim in config.encoder.dims)
        decoder, width = _decoder(config)
        self.decoder = _without_batch_norm(decoder)
        self.head = nn.Conv2d(width, config.num_classes, 3 if self._full_map else 1, padding=int(self._full_map))
        initialization.initialize_decoder(self.decoder)
        initialization.initialize_head(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K, H, W]`` of normalised images ``[B, C, H, W]`` of any size.

        Sizes that are no multiples of the patch size are filled up with zeros, the mean colour, below and on the right.
        """
        height, width = images.shape[-2:]
        patch = self.config.encoder.patch_size
        images = F.pad(images, (0, -width % patch, 0, -height % patch))
        maps = [features for features, _ in self.encoder.forward_stages(images)]
        for index, norm in enumerate(self.norms):
            maps[index] = norm(maps[index].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        above = [images[:, :0, ::factor, ::factor] for factor in self._factors]
        logits = self.head(self.decoder([*above, *maps]))
        if logits.shape[-2:] != images.shape[-2:]:
            logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    @property
    def _factors(self) -> tuple[int, ...]:
        """Of the sizes of maps without channels in front, which a decoder leaves out or takes sizes from."""
        return (1, 2) if not self._full_map or self.config.encoder.stem_stride == 4 else (1,)


def _decoder(config: SegmenterConfig) -> tuple[nn.Module, int]:
    """A decoder and the channels that it ends with."""
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
    from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    width, dims = config.decoder_width, list(config.encoder.dims)
    if config.decoder == "upernet":
        return UPerNetDecoder([0, 0, *dims], 5, decoder_channels=width), width
    if config.decoder == "fpn":
        # Dropout would be drawn for a batch, not for an image.
        decoder = FPNDecoder([0, 0, *dims], 5, width, width // 2, dropout=0.0)
        return decoder, width // 2
    above = [0, 0] if config.encoder.stem_stride == 4 else [0]
    widths = [max(LEAST_UNET, width >> step) for step in range(len(above) + len(dims) - 1)]
    return UnetDecoder([*above, *dims], widths, len(widths)), widths[-1]


def _without_batch_norm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(child.num_features // GROUP, child.num_features))
        else:
            _without_batch_norm(child)
    return module

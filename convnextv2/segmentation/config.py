"""Shape of a network for segmentation."""

from __future__ import annotations

from dataclasses import dataclass

from convnextv2.models.config import KINDS, EncoderConfig

DECODERS = ("upernet", "fpn", "unet")
"""As segmentation-models-pytorch has them."""
MOST_CLASSES = 255
"""Pixels travel as bytes, of which one value stands for those that are ignored."""
CENTRE_OVERLAP = 0.25
"""The usual share of a window's side that lies in the next one as well."""
WIDTH_STEP, MOST_WIDTH = 64, 4096
"""Decoders normalise groups of 8 channels, and halve their width up to three times."""


@dataclass(frozen=True)
class SegmenterConfig:
    """An encoder, a decoder of segmentation-models-pytorch, and a class for every pixel.

    Args:
        decoder: one of :data:`DECODERS`.
        decoder_width: channels of the decoder's finest maps (upernet, fpn), or of its coarsest (unet); a multiple
            of 64.
        class_names: one a class, at least two.
    """

    encoder: EncoderConfig
    decoder: str = "upernet"
    decoder_width: int = 256
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {self.decoder!r}")
        width = self.decoder_width
        if not isinstance(width, int) or isinstance(width, bool) or width % WIDTH_STEP or not 0 < width <= MOST_WIDTH:
            raise ValueError(f"decoder_width must be a multiple of {WIDTH_STEP} up to {MOST_WIDTH}, got {width!r}")
        if not all(isinstance(name, str) for name in self.class_names):
            raise ValueError("class_names must be text")
        if not 2 <= len(self.class_names) <= MOST_CLASSES:
            raise ValueError(f"expected 2 to {MOST_CLASSES} classes, got {len(self.class_names)}")

    @property
    def num_classes(self) -> int:
        """Logits of a pixel."""
        return len(self.class_names)


KINDS[SegmenterConfig.__name__] = SegmenterConfig

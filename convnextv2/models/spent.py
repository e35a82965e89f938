"""What a mask saves: the multiply-adds of a masked autoencoder's parts, beside those of every patch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from convnextv2.models.config import NUM_STAGES, FCMAEConfig, check_image_size
from convnextv2.models.masking import keep_count

EXPANSION, DECODER_TAPS = 4, 49
"""Of the hidden layer of a block, and of the decoder's depthwise convolutions."""


@dataclass(frozen=True)
class Spent:
    """Multiply-adds of a part for one image, forward.

    Args:
        name: ``stage 1``, with the stem, to ``stage 4``, each with the downsampling before it; then ``decoder``.
        dense: with nothing masked; of the decoder, with every patch predicted.
        spent: in pre-training: of the encoder, of the cells of visible patches; of the decoder, whose last layers run
            for the masked patches alone, all of it.
    """

    name: str
    dense: int
    spent: int

    @property
    def share(self) -> float:
        """Spent of dense."""
        return self.spent / self.dense


@dataclass(frozen=True)
class UnderAMask:
    """The parts, and how many patches are visible of how many."""

    mask_ratio: float
    visible: int
    patches: int
    parts: tuple[Spent, ...]

    @property
    def encoder(self) -> Spent:
        """The four stages together."""
        return total("encoder", self.parts[:NUM_STAGES])

    @property
    def whole(self) -> Spent:
        """The encoder and the decoder together."""
        return total("together", self.parts)


def total(name: str, parts: Iterable[Spent]) -> Spent:
    """The sum of parts."""
    parts = list(parts)
    return Spent(name, sum(part.dense for part in parts), sum(part.spent for part in parts))


def under_a_mask(config: FCMAEConfig, img_size: tuple[int, int], mask_ratio: float | None = None) -> UnderAMask:
    """What is spent on one image of (H, W) pixels.

    Counted as :func:`~convnextv2.models.summary.layers` does, which runs the network, here by arithmetic: a depthwise
    convolution at every tap, whether what lies under it is visible or not. A step of training takes about three times
    as much: the gradients of inputs and of weights cost what the forward pass does. ``mask_ratio`` None takes the
    configuration's.

    Raises ValueError if the image size or the mask ratio does not fit.
    """
    encoder, ratio = config.encoder, config.mask_ratio if mask_ratio is None else mask_ratio
    check_image_size(img_size, encoder.patch_size)
    patches = (img_size[0] // encoder.patch_size) * (img_size[1] // encoder.patch_size)
    visible = keep_count(patches, ratio)
    inputs = [encoder.in_chans * encoder.stem_stride**2, *(4 * dim for dim in encoder.dims)]
    parts, taps = [], encoder.kernel_size**2
    for number, (side, dim) in enumerate(encoder.stages):
        block = taps * dim + 2 * EXPANSION * dim**2
        patch = side**2 * (inputs[number] * dim + encoder.depths[number] * block)
        parts.append(Spent(f"stage {number + 1}", patches * patch, visible * patch))
    dim = config.decoder_dim
    layer, pixels = EXPANSION * dim**2, encoder.in_chans * encoder.patch_size**2 * dim
    every = DECODER_TAPS * dim + layer  # GRN takes norms over all patches: what follows it can be of the masked alone
    before = visible * encoder.dims[-1] * dim + patches * ((config.decoder_depth - 1) * (every + layer) + every)
    last = layer + pixels
    parts.append(Spent("decoder", before + patches * last, before + (patches - visible) * last))
    return UnderAMask(ratio, visible, patches, tuple(parts))

"""The reconstruction loss where some pixels have no data: they weigh nothing, in targets and in the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ops.active_set import ActiveSet


def parted(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images ``[B, C, H, W]`` with 0, the mean, where they are NaN; and where they are not, bool of that shape."""
    valid = ~images.isnan()
    return torch.where(valid, images, 0.0), valid


def valid_loss(pred: Tensor, images: Tensor, valid: Tensor, hidden: ActiveSet, eps: float | None) -> Tensor:
    """Mean over the masked patches with data of the mean squared error of their pixels with data; 0 without any.

    Args:
        pred: ``[M, patch_size² · C]`` of the masked patches, channels last in a patch.
        images: ``[B, C, H, W]``, finite also where there is no data.
        valid: bool of that shape.
        hidden: the masked patches.
        eps: of the normalisation of targets by mean and unbiased variance of the pixels with data of a patch; None for
            targets that are not normalised.

    Raises:
        ValueError: if ``valid`` is of another shape than the images.
    """
    if valid.shape != images.shape:
        raise ValueError(f"expected `valid` {tuple(images.shape)}, as the images, got {tuple(valid.shape)}")

    def rows(values: Tensor) -> Tensor:
        patches, channels = hidden.gather_patches(values).float(), values.shape[1]
        return patches.view(patches.shape[0], channels, patches.shape[1] // channels).transpose(1, 2).flatten(1)

    weights, target = rows(valid.to(images.dtype)), rows(images)
    count = weights.sum(1, keepdim=True)
    if eps is not None:
        apart = (target - (target * weights).sum(1, keepdim=True) / count.clamp_min(1)) * weights
        variance = apart.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)
        target = apart / (variance + eps).sqrt()
    errors = ((pred.float() - target).square() * weights).sum(1, keepdim=True) / count.clamp_min(1)
    return errors.sum() / (count > 0).sum().clamp_min(1)

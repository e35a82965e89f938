"""Feature diversity, the measure of feature collapse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convnextv2.models.encoder import Encoder
from convnextv2.models.modes import evaluation_mode
from sparse_ops.grid import DenseGrid


@torch.no_grad()
def feature_diversity(encoder: Encoder, images: Tensor) -> tuple[float, ...]:
    """Mean pairwise cosine distance between channels, ``mean over i, j of (1 - cos(x_i, x_j)) / 2``, of each stage.

    In [0, 1]; 0 means that all channels are alike, feature collapse. The mean over the four stages is the measure of
    ConvNeXt V2, section 3.2. A channel is the vector of its values at every cell of all ``images`` ``[B, C, H, W]``
    (unmasked, on a dense grid). The encoder is in evaluation mode meanwhile, and every module gets its own mode back.
    """
    distances = []
    with evaluation_mode(encoder):
        for x, grid in encoder.forward_stages(images, DenseGrid(images.shape[0])):
            channels = nn.functional.normalize(grid.cells(x).flatten(0, -2).float().T, dim=1)
            # The mean over all pairs of unit vectors is the squared length of their mean.
            distances.append((1 - channels.mean(0).square().sum()) / 2)
    return tuple(torch.stack(distances).tolist())

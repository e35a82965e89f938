"""The dense truth: sparse operations computed the obvious way, through dense maps that are masked again and again.

Rows are put on a dense map, which is convolved, and the visible cells are read; the truth is what comes of float64.
Coordinates come from plain loops below and share no code with the active set or a backend.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_ops.grid import DenseGrid, GRNScope
from sparse_ops.pointwise import MLPWeights, widened


def visible_from_text(*images: str) -> Tensor:
    """``[B, gh, gw]`` bool, True = visible, from one text an image: rows by ``/``, ``.`` visible, ``#`` masked."""
    return torch.tensor([[[char == "." for char in row] for row in image.split("/")] for image in images])


def cell_coordinates(visible: Tensor, side: int) -> list[tuple[int, int, int]]:
    """(image, y, x) of every visible cell, in the order in which an active set stores its rows.

    Args:
        visible: ``[B, gh, gw]``, True = visible.
        side: cells a patch side, a power of two.
    """
    cells = []
    for image, patch_row, patch_column in visible.nonzero().tolist():
        for position in range(side * side):
            x = y = 0
            for bit in range(side.bit_length()):
                x |= (position >> (2 * bit) & 1) << bit
                y |= (position >> (2 * bit + 1) & 1) << bit
            cells.append((image, patch_row * side + y, patch_column * side + x))
    return cells


def dense_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor, side: int) -> Tensor:
    """Depthwise convolution over the visible cells through a dense map, shape and dtype as ``x``. Differentiable.

    Args:
        x: ``[N, C]``, rows in the order of :func:`cell_coordinates`.
        weight: ``[C, 1, K, K]``.
        bias: ``[C]`` or None.
        visible: ``[B, gh, gw]``, True = visible.
        side: cells a patch side.
    """
    batch, height, width = visible.shape[0], visible.shape[1] * side, visible.shape[2] * side
    cells = cell_coordinates(visible, side)
    flat = torch.tensor([(b * height + y) * width + x_ for b, y, x_ in cells], dtype=torch.long, device=x.device)
    rows = x.new_zeros(batch * height * width, x.shape[1]).index_copy(0, flat, x)
    dense = rows.view(batch, height, width, -1).permute(0, 3, 1, 2)
    out = F.conv2d(dense, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return out.permute(0, 2, 3, 1).reshape(batch * height * width, -1).index_select(0, flat)


def plain_mlp(x: Tensor, weights: MLPWeights, row_offsets: Tensor, eps: tuple[float, float] = (1e-6, 1e-6)) -> Tensor:
    """LayerNorm, linear, GELU, GRN, linear as separate torch operations; arguments as :func:`sparse_ops.convnext_mlp`.

    GRN takes its norms in float32 or wider.
    """
    norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2 = weights
    h = F.gelu(F.linear(F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, eps[0]), w1, b1))
    wide = widened(h)
    groups = []
    for start, stop in zip(row_offsets[:-1].tolist(), row_offsets[1:].tolist(), strict=True):
        energy = wide[start:stop].square().sum(0)
        alive = energy > 0
        norm = torch.where(alive, torch.where(alive, energy, 1).sqrt(), 0)
        scale = 1 + gamma.to(wide.dtype) * norm / (norm.mean() + eps[1])
        groups.append(h[start:stop] * scale.to(h.dtype) + beta)
    return F.linear(torch.cat(groups), w2, b2)


class MaskedDenseGrid(DenseGrid):
    """A dense grid, re-masked so that its visible cells hold exactly what a sparse grid computes.

    Only two operations see other cells: the depthwise convolution, whose input is masked, and the sums of GRN, which
    are taken over visible cells. Everything else leaves garbage in masked cells, which costs nothing to ignore. That
    makes it the fastest dense implementation of the sparse network, and independent of the active set; pixels of
    masked patches must be finite, though.

    Args:
        visible: ``[B, gh, gw]``, True = visible.
        dtype: of the mask that features are multiplied by; that of the features saves a conversion.
    """

    takes_any_size = False

    def __init__(
        self, visible: Tensor, side: int = 8, grn_scope: GRNScope = "image", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(visible.shape[0], grn_scope)
        self.visible, self.side, self.dtype = visible, side, dtype
        batch, gh, gw = visible.shape
        mask = visible.to(dtype)[:, :, None, :, None].expand(batch, gh, side, gw, side)
        self.mask = mask.reshape(batch, gh * side, gw * side, 1)
        """``[B, H, W, 1]``: 1 in visible cells, 0 in masked ones."""

    def depthwise(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return super().depthwise(layer, x * self.features(self.mask).to(x.dtype))

    def down(self) -> MaskedDenseGrid:
        return MaskedDenseGrid(self.visible, self.side // 2, self.grn_scope, self.dtype)

    def image_sum(self, cells: Tensor) -> Tensor:
        mask = self.mask.to(cells.dtype)
        if torch.compiler.is_compiling():
            return super().image_sum(cells * mask)
        # The mask as a row vector: one pass over the cells where no compiler fuses the multiplication with the sum.
        with torch.autocast(cells.device.type, enabled=False):
            return torch.bmm(mask.flatten(1).unsqueeze(1), cells.flatten(1, 2)).squeeze(1)

    def gather(self, x: Tensor) -> Tensor:
        """The visible cells of features ``[B, C, H, W]`` as rows ``[N, C]``, in the order of an active set."""
        index = torch.tensor(cell_coordinates(self.visible, self.side), device=x.device).reshape(-1, 3)
        return self.cells(x)[index[:, 0], index[:, 1], index[:, 2]]

"""Layers on a sparse grid, which computes with their weights instead of calling them.

That is the same as calling a layer only where the layer is torch's own: an adapter, say, does more. A convolution that
does is refused; of the pointwise half of a block the layers are then called one by one. Hooks are called either way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_ops.checks import takes_patches
from sparse_ops.grid import MLP, Grid
from sparse_ops.pointwise import MLPWeights, pointwise_linear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class GRN(nn.Module):
    """Global response normalisation (ConvNeXt V2, section 3.2): ``x · (1 + gamma · N(G(x))) + beta``.

    ``G`` is the L2 norm of a channel over the visible cells, ``N`` divides it by its mean over the channels. Norms
    are computed in float32 or wider; a channel that is zero everywhere has norm 0 and gradient 0, not NaN.

    Args:
        dim: channels. The parameters have the shape ``[1, 1, 1, dim]`` of the official dense network.
        eps: added to the mean of the norms.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, cells: Tensor, grid: Grid) -> Tensor:
        return grid.grn(cells, self.gamma.flatten(), self.beta.flatten(), self.eps)


def has_hooks(layer: nn.Module) -> bool:
    """Whether something is to be called when the layer is."""
    return any(getattr(layer, name, None) for name in _HOOKS)


def _computes_as(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the layer does what ``kind`` does, with the weights that the layer shows."""
    return isinstance(layer, kind) and type(layer).forward is kind.forward and "forward" not in vars(layer)


def conv_weights(layer: nn.Conv2d, fits: Callable[[nn.Conv2d, Tensor], bool]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution that is torch's own and one that ``fits``; TypeError if it is not."""
    weight = layer.weight if _computes_as(layer, nn.Conv2d) else None  # once: a parametrization may compute it
    if weight is None or not fits(layer, weight):
        more = f"{type(layer).__name__} does more than that"
        reason = more if weight is None else f"{layer} is none that {fits.__name__.replace('_', ' ')}"
        raise TypeError(
            f"a sparse grid computes with the weights of a Conv2d, and {reason}; "
            "merge it into an ordinary layer, or run the network on a dense grid"
        )
    return weight, layer.bias


def call_in_place_of(layer: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, with the hooks of the layer that it stands for."""
    if not has_hooks(layer):
        return function(x)
    layer.forward = function
    try:
        return layer(x)
    finally:
        del layer.forward


def pointwise_conv(layer: nn.Conv2d, cells: Tensor) -> Tensor:
    """A 1×1 convolution of cells, channels last."""
    weight, bias = conv_weights(layer, takes_patches)
    return call_in_place_of(layer, lambda cells: pointwise_linear(cells, weight, bias), cells)


def mlp_weights(layers: MLP) -> MLPWeights | None:
    """What the layers compute with, or None where calling them does more than that."""
    norm, pwconv1, act, grn, pwconv2 = layers
    kinds = nn.LayerNorm, nn.Linear, nn.GELU, GRN, nn.Linear
    own = all(_computes_as(layer, kind) and not has_hooks(layer) for layer, kind in zip(layers, kinds, strict=True))
    if not own or act.approximate != "none":
        return None
    of_grn = grn.gamma.flatten(), grn.beta.flatten()
    found = norm.weight, norm.bias, pwconv1.weight, pwconv1.bias, *of_grn, pwconv2.weight, pwconv2.bias
    return None if any(tensor is None for tensor in found) else MLPWeights(*found)

"""The layers of a network for one image: output shapes, parameters, multiply-adds. Found by running it."""

from __future__ import annotations

import copy
import functools
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.encoder import Block, Downsample, Stem
from convnextv2.models.fcmae import FCMAE


@dataclass(frozen=True)
class Layer:
    """A row of the table: a module, its type and its size.

    Args:
        shape: of its output for one image, channels last: (H, W, C), or (N, C) for N visible cells.
        parameters: all below it.
        multiply_adds: all below it: of convolutions, at every tap, and linear layers; normalisation is not counted.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def layers(
    model: FCMAE | ConvNeXtV2, img_size: tuple[int, int], mask_ratio: float | None = None, *, leaves: bool = False
) -> list[Layer]:
    """The rows for one image; they add up to the whole network. Costs a forward pass, nothing on the meta device.

    Args:
        model: a classifier, or a masked autoencoder, whose encoder's work is that of the visible cells alone.
        img_size: (H, W), divisible by the patch size.
        mask_ratio: of a masked autoencoder; None takes its own.
        leaves: single layers instead of stem, downsamplings, blocks and head.

    Raises ValueError if the image size or the mask ratio does not fit.
    """
    encoder = model.encoder if isinstance(model, FCMAE) else model
    images = torch.empty(1, encoder.encoder_config.in_chans, *img_size, device=next(model.parameters()).device)
    shapes, watched = dict[str, tuple[int, ...]](), dict[str, nn.Module]()
    with ExitStack() as hooks, torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_TAPS) as counter:
        for name, module in model.named_modules():  # from the outside in
            own = next(module.parameters(recurse=False), None) is not None
            row = own or (not leaves and isinstance(module, Stem | Downsample | Block))
            if name and row and not any(name.startswith(f"{outer}.") for outer in watched):
                note = functools.partial(lambda name, _, args, out: shapes.update({name: tuple(out.shape)}), name)
                hooks.enter_context(module.register_forward_hook(note))
                watched[name] = module
        if isinstance(model, FCMAE):
            readable = copy.copy(model)
            readable.backend = "reference"  # whose operations are torch's own
            readable(images, mask_ratio=mask_ratio)
        else:
            model(images)
    flops, rows = counter.get_flop_counts(), list[Layer]()
    for name, shape in shapes.items():  # in the order in which they were called
        module, place = watched[name], f"{type(model).__name__}.{name}"
        work = sum(flops.get(place, {}).values()) // 2
        count = sum(parameter.numel() for parameter in module.parameters())
        rows.append(Layer(name, type(module).__name__, _channels_last(module, shape), count, work))
        if name == "proj":
            token = model.get_parameter("mask_token")
            rows.append(Layer("mask_token", "Parameter", tuple(token.shape), token.numel(), 0))
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    return rows


_TAPS: Any = {torch.ops.aten.addcmul_: lambda out, *_, **__: 2 * math.prod(out)}
"""Of the readable convolution, which adds tap by tap."""


def _channels_last(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of one image: without the batch. 1×1 convolutions and what is inside of a block have the channels last."""
    if len(shape) == 2:
        return shape if shape[0] > 1 else shape[1:]
    spatial = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
    return (*shape[2:], shape[1]) if spatial or isinstance(module, Stem | Downsample | Block) else shape[1:]

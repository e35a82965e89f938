"""Networks of other projects, run on their own weights: second opinions for verification.

They share no code with the layouts: a wrong tap order in one is not mirrored by the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnextv2.models.config import EncoderConfig
from convnextv2.weights.loaders import load_timm

EPS = 1e-6


def _cells(visible: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Coordinates ``[N, 3]`` (image, y, x) of the visible cells, and the map ``[B, H, W]`` of their rows (else -1)."""
    shown = visible.repeat_interleave(side, 1).repeat_interleave(side, 2)
    coordinates = shown.nonzero()
    index = torch.full(shown.shape, -1)
    index[shown] = torch.arange(coordinates.shape[0])
    return coordinates, index


def _taps(x_NC: Tensor, index: Tensor, corners: Tensor, taps: int) -> Iterator[Tensor]:
    """For each tap the rows ``[M, C]`` under it, 0 where masked or outside; ``corners`` ``[M, 3]`` are where tap 0 is.

    MinkowskiEngine numbers the taps with the first spatial axis, y, fastest.
    """
    side = math.isqrt(taps)
    for tap in range(taps):
        places = corners + torch.tensor([0, tap % side, tap // side])
        inside = ((places >= 0) & (places < torch.tensor(index.shape))).all(1)
        rows = torch.where(inside, index[torch.where(inside[:, None], places, 0).unbind(1)], -1)
        yield torch.where((rows >= 0)[:, None], x_NC[rows.clamp_min(0)], 0)


def official_sparse_features(state_dict: Mapping[str, Tensor], images: Tensor, visible: Tensor) -> Tensor:
    """Last-stage features of an official sparse encoder, from its own weights as they are: ``[P, C]``, the visible
    patches of the batch in row-major order.

    ``out[n] = Σ_k kernel[k] · x[n + offset(k)]`` over the visible cells, GRN per image; written to be read, not fast.

    Args:
        state_dict: MinkowskiEngine's names and shapes, with or without the prefix ``encoder.``.
        images: ``[B, C, H, W]`` float64.
        visible: ``[B, gh, gw]`` bool; every image must have a visible patch.
    """
    weights = {name.removeprefix("encoder."): value for name, value in state_dict.items()}

    def get(name: str) -> Tensor:
        return weights[name].to(images.dtype)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), EPS)

    def linear(x: Tensor, name: str) -> Tensor:
        if f"{name}.kernel" in weights:
            return x @ get(f"{name}.kernel") + get(f"{name}.bias")
        return F.linear(x, get(f"{name}.linear.weight"), get(f"{name}.linear.bias"))

    coordinates, index = _cells(visible, 8)
    stem = get("downsample_layers.0.0.weight")
    embedded = F.conv2d(images, stem, get("downsample_layers.0.0.bias"), stride=stem.shape[-1])
    image, y, x_ = coordinates.unbind(1)
    x = norm(embedded[image, :, y, x_], "downsample_layers.0.1")

    for stage in range(4):
        if stage:
            x = norm(x, f"downsample_layers.{stage}.0.ln")
            fine, (coordinates, index) = index, _cells(visible, 8 >> stage)
            taps = _taps(x, fine, coordinates * torch.tensor([1, 2, 2]), 4)
            kernel = get(f"downsample_layers.{stage}.1.kernel")
            x = sum(map(torch.matmul, taps, kernel), start=get(f"downsample_layers.{stage}.1.bias"))
        block = 0
        while f"stages.{stage}.{block}.dwconv.kernel" in weights:
            name = f"stages.{stage}.{block}"
            kernel = get(f"{name}.dwconv.kernel")
            centre = math.isqrt(len(kernel)) // 2
            taps = _taps(x, index, coordinates - torch.tensor([0, centre, centre]), len(kernel))
            h = sum(map(torch.mul, taps, kernel), start=get(f"{name}.dwconv.bias"))
            h = F.gelu(linear(norm(h, f"{name}.norm.ln"), f"{name}.pwconv1"))
            energy = h.new_zeros(images.shape[0], h.shape[1]).index_add(0, coordinates[:, 0], h * h)
            response = energy.sqrt()
            response = response / (response.mean(1, keepdim=True) + EPS)
            h = get(f"{name}.grn.gamma") * (h * response[coordinates[:, 0]]) + get(f"{name}.grn.beta") + h
            x = x + linear(h, f"{name}.pwconv2")
            block += 1
    return x


def official_dense_features(state_dict: Mapping[str, Tensor], config: EncoderConfig, images: Tensor) -> Tensor:
    """Last-stage features ``[B, C, h, w]`` of an official dense network, from its own weights as they are, by torch's
    functions alone; ``images`` ``[B, C, H, W]`` float64."""

    def get(name: str) -> Tensor:
        return state_dict[name].to(images.dtype)

    def convolution(x: Tensor, name: str, **options: int) -> Tensor:
        return F.conv2d(x, get(f"{name}.weight"), get(f"{name}.bias"), **options)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt()
        return x * get(f"{name}.weight")[:, None, None] + get(f"{name}.bias")[:, None, None]

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.einsum("oc,bchw->bohw", get(f"{name}.weight"), x) + get(f"{name}.bias")[:, None, None]

    x = norm(convolution(images, "downsample_layers.0.0", stride=config.stem_stride), "downsample_layers.0.1")
    for stage, depth in enumerate(config.depths):
        if stage:
            x = convolution(norm(x, f"downsample_layers.{stage}.0"), f"downsample_layers.{stage}.1", stride=2)
        for name in (f"stages.{stage}.{block}" for block in range(depth)):
            h = convolution(x, f"{name}.dwconv", padding=config.kernel_size // 2, groups=x.shape[1])
            h = F.gelu(linear(norm(h, f"{name}.norm"), f"{name}.pwconv1"))
            response = h.square().sum((2, 3), keepdim=True).sqrt()
            response = response / (response.mean(1, keepdim=True) + EPS)
            gamma, beta = (get(f"{name}.grn.{end}").flatten()[:, None, None] for end in ("gamma", "beta"))
            x = x + linear(gamma * (h * response) + beta + h, f"{name}.pwconv2")
    return x


def timm_network(state_dict: Mapping[str, Tensor], config: EncoderConfig) -> Any:
    """Timm's network with these weights, in float64, of the kind that they are: 1×1 convolutions or linear layers.

    The final norm may be missing, and is as initialised then. Raises CheckpointError if timm cannot represent the
    configuration, or the names or shapes do not fit.
    """
    width = config.dims[-1]
    norm = {"head.norm.weight": torch.ones(width), "head.norm.bias": torch.zeros(width)}
    kind = state_dict["stages.0.blocks.0.mlp.fc1.weight"].dim() == 4
    return load_timm({**norm, **state_dict}, config, conv_mlp=kind)

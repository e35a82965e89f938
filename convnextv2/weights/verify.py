"""Does a converted encoder compute what its source computed? Answered by running both, in float64.

The official sparse layout is run as it is written, tap by tap over coordinates, by :func:`official_sparse_features`,
which shares no code with the converter: a wrong tap order in one is not mirrored by the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnextv2.models.config import EncoderConfig
from convnextv2.models.encoder import Encoder
from convnextv2.weights.checkpoint import CheckpointError
from convnextv2.weights.layouts import Layout, detect_layout
from convnextv2.weights.reading import read_weights
from sparse_ops.active_set import ActiveSet
from sparse_ops.oracle import MaskedDenseGrid
from sparse_ops.sparse_grid import SparseGrid

EPS = 1e-6
TOLERANCE = 2**16 * torch.finfo(torch.float64).eps
"""Largest error allowed, relative to the largest feature: 16 bits of float64's 52 are left to rounding, about 1.5e-11.

A single tap in the wrong place costs many orders of magnitude more.
"""

PATCHES = 3
"""Patches a side of the random image."""


@dataclass(frozen=True)
class Verification:
    """Errors relative to the largest feature, over every visible cell and channel of the last stage."""

    masked: float
    """Sparse encoder against the dense network re-masked at each depthwise convolution."""
    unmasked: float
    """Sparse encoder against the dense network, nothing masked."""
    foreign: float | None = None
    """Timm's own network against the sparse encoder, nothing masked; None where timm's layout is not involved."""

    @property
    def largest(self) -> float:
        """The largest of the errors; NaN where a comparison gave NaN."""
        errors = [error for error in (self.masked, self.unmasked, self.foreign) if error is not None]
        return math.nan if any(math.isnan(error) for error in errors) else max(errors)

    @property
    def passed(self) -> bool:
        """Whether the largest error is within :data:`TOLERANCE`."""
        return self.largest <= TOLERANCE

    def __str__(self) -> str:
        foreign = "" if self.foreign is None else f", timm's network {self.foreign:.1e}"
        return (
            f"largest relative error {self.largest:.1e} (random mask {self.masked:.1e}, nothing masked "
            f"{self.unmasked:.1e}{foreign}; float64, tolerance {TOLERANCE:.1e})"
        )


def _cells(visible: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Coordinates ``[N, 3]`` (image, y, x) of the visible cells, and the map ``[B, H, W]`` of their rows (else -1)."""
    shown = visible.repeat_interleave(side, 1).repeat_interleave(side, 2)
    coordinates = shown.nonzero()
    index = torch.full(shown.shape, -1)
    index[shown] = torch.arange(coordinates.shape[0])
    return coordinates, index


def _rows_at(coordinates: Tensor, index: Tensor) -> Tensor:
    """Row of each coordinate ``[N, 3]``, or -1 where it is masked or outside."""
    size = torch.tensor(index.shape[1:])
    inside = ((coordinates[:, 1:] >= 0) & (coordinates[:, 1:] < size)).all(1)
    image, y, x = torch.where(inside[:, None], coordinates, 0).unbind(1)
    return torch.where(inside, index[image, y, x], -1)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return torch.where((rows >= 0)[:, None], x[rows.clamp_min(0)], 0)


def _offset(tap: int, side: int, centre: int) -> Tensor:
    """Offset (0, dy, dx) of a tap as MinkowskiEngine numbers them: the first spatial axis, y, is the fastest."""
    return torch.tensor([0, tap % side - centre, tap // side - centre])


def official_sparse_features(state_dict: Mapping[str, Tensor], images: Tensor, visible: Tensor) -> Tensor:
    """Last-stage features of an official sparse encoder, from its own weights as they are.

    ``out[n] = Σ_k kernel[k] · x[n + offset(k)]`` over the visible cells, GRN per image; written to be read, not fast.

    Args:
        state_dict: MinkowskiEngine's names and shapes, with or without the prefix ``encoder.``.
        images: ``[B, C, H, W]`` float64.
        visible: ``[B, gh, gw]`` bool; every image must have a visible patch.

    Returns:
        ``[P, C]``, the visible patches of the batch in row-major order.
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

    side = 8
    coordinates, index = _cells(visible, side)
    stem = get("downsample_layers.0.0.weight")
    embedded = F.conv2d(images, stem, get("downsample_layers.0.0.bias"), stride=stem.shape[-1])
    image, y, x_ = coordinates.unbind(1)
    x = norm(embedded[image, :, y, x_], "downsample_layers.0.1")

    for stage in range(4):
        if stage:
            side //= 2
            x = norm(x, f"downsample_layers.{stage}.0.ln")
            fine, (coordinates, index) = index, _cells(visible, side)
            corner = coordinates * torch.tensor([1, 2, 2])
            kernel = get(f"downsample_layers.{stage}.1.kernel")
            x = sum(
                (_take(x, _rows_at(corner + _offset(tap, 2, 0), fine)) @ kernel[tap] for tap in range(4)),
                start=get(f"downsample_layers.{stage}.1.bias"),
            )
        block = 0
        while f"stages.{stage}.{block}.dwconv.kernel" in weights:
            name = f"stages.{stage}.{block}"
            kernel = get(f"{name}.dwconv.kernel")
            width = math.isqrt(kernel.shape[0])
            h = get(f"{name}.dwconv.bias")
            for tap in range(kernel.shape[0]):
                rows = _rows_at(coordinates + _offset(tap, width, width // 2), index)
                h = h + kernel[tap] * _take(x, rows)
            h = F.gelu(linear(norm(h, f"{name}.norm.ln"), f"{name}.pwconv1"))
            energy = h.new_zeros(images.shape[0], h.shape[1]).index_add(0, coordinates[:, 0], h * h)
            response = energy.sqrt()
            response = response / (response.mean(1, keepdim=True) + EPS)
            h = get(f"{name}.grn.gamma") * (h * response[coordinates[:, 0]]) + get(f"{name}.grn.beta") + h
            x = x + linear(h, f"{name}.pwconv2")
            block += 1
    return x


def _encoder(weights: Mapping[str, Tensor], config: EncoderConfig) -> Encoder:
    with torch.device("meta"):
        encoder = Encoder(config)
    encoder.load_state_dict({name: value.double() for name, value in weights.items()}, assign=True)
    return encoder.eval()


def timm_network(state_dict: Mapping[str, Tensor], config: EncoderConfig) -> Any:
    """Timm's ConvNeXt with these weights, in float64; the final norm and head may be missing.

    Raises:
        CheckpointError: if timm cannot represent the configuration, or the names or shapes do not fit.
    """
    from timm.models.convnext import ConvNeXt

    if config.stem_stride == 2:
        # Timm then adds a downsampling of its own before the first stage.
        raise CheckpointError("timm has no ConvNeXt with a stem of stride 2 (patch size 16)")
    classes = state_dict["head.fc.weight"].shape[0] if "head.fc.weight" in state_dict else 0
    network = ConvNeXt(
        in_chans=config.in_chans,
        num_classes=classes,
        depths=config.depths,
        dims=config.dims,
        kernel_sizes=config.kernel_size,
        patch_size=config.stem_stride,
        conv_mlp=state_dict["stages.0.blocks.0.mlp.fc1.weight"].dim() == 4,
        use_grn=True,
        ls_init_value=None,
        norm_eps=EPS,
    ).double()
    try:
        result = network.load_state_dict(dict(state_dict), strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"timm's network does not take the weights: {' '.join(str(error).split())}") from error
    missing = [name for name in result.missing_keys if not name.startswith("head.")]
    if missing or result.unexpected_keys:
        raise CheckpointError(f"timm's network misses {missing} and does not know {result.unexpected_keys}")
    return network.eval()


def _relative(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.nan
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale)


@torch.no_grad()
def verify_conversion(source: Mapping[str, Tensor], written: Mapping[str, Tensor], seed: int = 0) -> Verification:
    """Run the sparse encoder and the dense network of a conversion on random images and masks.

    The sparse side runs the source, the dense side what is about to be written; when the official sparse layout is
    the one written, the other way round. An official sparse layout on either side is run by
    :func:`official_sparse_features`, and timm's by timm.

    Args:
        source: state dict as it was read.
        written: state dict as it will be written.
        seed: of images and mask.

    Raises:
        CheckpointError: if either is not a whole encoder.
    """
    layouts: tuple[Layout, Layout] = (detect_layout(source), detect_layout(written))
    read_source, read_written = read_weights(source), read_weights(written)
    config = read_source.config
    if read_written.config != config:
        return Verification(math.nan, math.nan)
    official = None
    sparse, dense = read_source, read_written
    if layouts[0] == "sparse-official":
        official = source
    elif layouts[1] == "sparse-official":
        official, sparse, dense = written, read_written, read_source
    dense_encoder = _encoder(dense.encoder, config)
    sparse_encoder = _encoder(sparse.encoder, config) if official is None else None

    generator = torch.Generator().manual_seed(seed)
    size = PATCHES * config.patch_size
    images = torch.randn(2, config.in_chans, size, size, generator=generator, dtype=torch.float64)
    visible = torch.rand(2, PATCHES, PATCHES, generator=generator) < 0.45
    visible[:, 1, 1] = True

    def sparse_features(shown: Tensor) -> Tensor:
        if sparse_encoder is None:
            assert official is not None
            return official_sparse_features(official, images, shown)
        return sparse_encoder(images, SparseGrid(ActiveSet.from_mask(~shown), "reference"))

    everything = torch.ones_like(visible)
    masked_dense = dense_encoder(images, MaskedDenseGrid(visible, dtype=torch.float64)).permute(0, 2, 3, 1)
    full = sparse_features(everything)
    foreign = None
    for layout, state in zip(layouts, (source, written), strict=True):
        if layout == "timm":
            features = timm_network(state, config).forward_features(images).permute(0, 2, 3, 1).flatten(0, 2)
            foreign = max(foreign or 0.0, _relative(features, full))
    return Verification(
        _relative(masked_dense[visible], sparse_features(visible)),
        _relative(dense_encoder(images).permute(0, 2, 3, 1).flatten(0, 2), full),
        foreign,
    )

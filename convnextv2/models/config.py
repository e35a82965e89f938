"""Architectures as frozen dataclasses, and the variants that have a name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_ops.grid import GRNScope

PATCH_SIZES = (32, 16, 8)
GRN_SCOPES = ("image", "batch")  # as sparse_ops has them, which is not imported without torch
POOLINGS = ("mean", "mean_std", "stages")
"""Ways to pool. ``mean``, over the cells of the last map, is the published network's. ``mean_std`` adds the standard
deviation, with which frozen features of a masked autoencoder are classified better than by their mean alone, and
``stages`` takes both of the maps of all four stages (docs/few_labels.md)."""
NUM_STAGES = 4


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of the ConvNeXt V2 encoder.

    Args:
        depths, dims: blocks and channels in each of the four stages.
        in_chans: channels of the images.
        patch_size: pixels a side of a patch, the unit of masking and the encoder's total stride: 32, 16 or 8.
            The stem's stride is an eighth of it (4, 2 or 1), so a patch is 8×8 cells after the stem.
        kernel_size: side of the depthwise kernels.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    in_chans: int = 3
    patch_size: int = 32
    kernel_size: int = 7
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("depths", "dims"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != NUM_STAGES or not all(_is_count(v) for v in value):
                raise ValueError(f"{name} must be four positive integers, got {value}")
        if not _is_count(self.patch_size) or self.patch_size not in PATCH_SIZES:
            raise ValueError(f"patch_size must be one of {PATCH_SIZES}, got {self.patch_size}")
        if not _is_count(self.in_chans):
            raise ValueError(f"in_chans must be at least 1, got {self.in_chans}")
        if not _is_count(self.kernel_size) or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}")

    @property
    def stem_stride(self) -> int:
        """Pixels a side of a cell after the stem."""
        return self.patch_size // 2 ** (NUM_STAGES - 1)

    @property
    def stages(self) -> list[tuple[int, int]]:
        """Cells a side of a patch, and channels, of each stage."""
        return [(2 ** (NUM_STAGES - 1 - stage), dim) for stage, dim in enumerate(self.dims)]


@dataclass(frozen=True)
class FCMAEConfig:
    """Shape of the masked autoencoder.

    Args:
        img_size: (height, width) in pixels of the training images; other multiples of the patch size work too.
        mask_ratio: share of the patches that is removed.
        decoder_depth, decoder_dim: blocks and channels of the decoder.
        norm_pix_loss: normalise each target patch by its own mean and variance.
        grn_scope: GRN norms over each image ("image", as the dense network does) or over the batch ("batch", as the
            official sparse pre-training does).
    """

    encoder: EncoderConfig
    img_size: tuple[int, int] = (224, 224)
    mask_ratio: float = 0.6
    decoder_depth: int = 1
    decoder_dim: int = 512
    norm_pix_loss: bool = True
    grn_scope: GRNScope = "image"

    def __post_init__(self) -> None:
        size = (self.img_size, self.img_size) if isinstance(self.img_size, int) else tuple(self.img_size)
        object.__setattr__(self, "img_size", size)
        check_image_size(size, self.encoder.patch_size)
        depth, dim = self.decoder_depth, self.decoder_dim
        if not _is_count(depth) or not _is_count(dim):
            raise ValueError(f"decoder_depth and decoder_dim must be positive, got {depth}, {dim}")
        if self.grn_scope not in GRN_SCOPES:
            raise ValueError(f"grn_scope must be one of {GRN_SCOPES}, got {self.grn_scope!r}")

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches (gh, gw) of an image of ``img_size``."""
        return self.img_size[0] // self.encoder.patch_size, self.img_size[1] // self.encoder.patch_size


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of the dense classifier: an encoder, global average pooling, LayerNorm and a linear head.

    Args:
        num_classes: outputs of the head; 0 leaves the head out, the network then returns pooled features.
        head_init_scale: factor on the head's initial weights.
        pooling: one of :data:`POOLINGS`.
    """

    encoder: EncoderConfig
    num_classes: int = 1000
    head_init_scale: float = 1.0
    class_names: tuple[str, ...] = ()
    pooling: str = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.num_classes != 0 and not _is_count(self.num_classes):
            raise ValueError(f"num_classes must be a whole number, not negative, got {self.num_classes}")
        scale = self.head_init_scale
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"head_init_scale must be a finite number, got {scale!r}")
        if not all(isinstance(name, str) for name in self.class_names):
            raise ValueError("class_names must be text")
        if len(self.class_names) not in (0, self.num_classes):
            raise ValueError(f"expected {self.num_classes} class_names, one per class, got {len(self.class_names)}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


MOST_PIXELS = 2**26
"""Of what a network is given: 8192 × 8192."""


def check_image_size(size: tuple[int, ...], patch_size: int, *, dense: bool = False) -> None:
    """Raise ValueError unless ``size`` is (H, W), both positive multiples of ``patch_size``; for a ``dense`` network,
    in which strides leave out what does not fill a cell, both at least ``patch_size``; and not over
    :data:`MOST_PIXELS`."""
    if math.prod(size) > MOST_PIXELS:
        raise ValueError(f"image size {' × '.join(map(str, size))} is of more than {MOST_PIXELS:,} pixels")
    if dense and len(size) == 2 and min(size) < patch_size:
        raise ValueError(
            f"image size {size[0]} × {size[1]} is smaller than the patch size {patch_size}, the network's total stride"
        )
    if len(size) != 2 or (not dense and any(isinstance(s, float) or s < 1 or s % patch_size for s in size)):
        near = tuple(max(1, round(s / patch_size)) * patch_size for s in size)
        raise ValueError(
            f"image size {' × '.join(map(str, size))} is not divisible by the patch size {patch_size}; "
            f"the nearest that is: {' × '.join(map(str, near))}"
        )


VARIANTS: Mapping[str, tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    "convnextv2_atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnextv2_femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnextv2_pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnextv2_nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnextv2_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnextv2_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnextv2_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnextv2_huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}
"""Depths and widths of the variants; these eight are the published ones (ConvNeXt V2, appendix A.1).

A new line is a new variant: all that takes a name of a model knows it, and ``convnextv2`` has a function of its name.
"""


def encoder_config(name: str | EncoderConfig, **overrides: Any) -> EncoderConfig:
    """Configuration of a variant by name, ``convnextv2_atto`` … ``convnextv2_huge`` (the prefix may be left out).

    A configuration instead of a name is returned as it is, without ``overrides``. Raises ValueError if no variant has
    that name.
    """
    if isinstance(name, EncoderConfig):
        return name
    full = name if name.startswith("convnextv2_") else f"convnextv2_{name}"
    if full not in VARIANTS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(VARIANTS)}")
    depths, dims = VARIANTS[full]
    return EncoderConfig(**{"depths": depths, "dims": dims, **overrides})


def variant_name(config: EncoderConfig) -> str | None:
    """Name of the variant with these depths and widths, or None for a custom one."""
    return next((name for name, shape in VARIANTS.items() if shape == (config.depths, config.dims)), None)


KINDS: dict[str, Any] = {cls.__name__: cls for cls in (EncoderConfig, FCMAEConfig, ClassifierConfig)}
"""What :func:`config_from_dict` makes; packages above add their own."""


def config_to_dict(config: EncoderConfig | FCMAEConfig | ClassifierConfig) -> dict[str, Any]:
    """What JSON can hold of a configuration, all but the published ``pooling``; :func:`config_from_dict` reads it."""
    return {"kind": type(config).__name__} | {k: v for k, v in asdict(config).items() if (k, v) != ("pooling", "mean")}


def config_from_dict(data: Mapping[str, Any]) -> EncoderConfig | FCMAEConfig | ClassifierConfig:
    """Inverse of :func:`config_to_dict`; ValueError if the kind is unknown, or a field missing, unknown or of a wrong
    type."""
    values = dict(data)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown configuration kind {kind!r}; expected {', '.join(KINDS)} (fcmae segment: its own)")
    cls = KINDS[kind]
    if unknown := set(values) - {f.name for f in fields(cls)}:
        raise ValueError(f"{kind} has no field {', '.join(sorted(unknown))}; written by a newer version?")
    try:
        if "encoder" in values:
            values["encoder"] = config_from_dict({**values["encoder"], "kind": "EncoderConfig"})
        if not 0 <= values.get("mask_ratio", 0) <= 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {values['mask_ratio']}")
        return cls(**values)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"incomplete {kind}: {error}") from error

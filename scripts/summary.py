"""List the layers of a network: output shape, parameters and multiply-adds of one image.

Multiply-adds are those of convolutions (at every tap) and linear layers; normalisation is not counted. For a masked
autoencoder the encoder's are those of the visible cells alone, the decoder's those of every patch.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import _cli
import torch
from torch import nn

from convnextv2 import FCMAE, VARIANTS, ConvNeXtV2, Encoder, create_fcmae, create_model
from convnextv2.models.config import ClassifierConfig, FCMAEConfig, check_image_size, encoder_config
from convnextv2.models.masking import keep_count
from convnextv2.weights.checkpoint import CheckpointError, load_checkpoint
from convnextv2.weights.loading import load_model


@dataclass(frozen=True)
class Layer:
    """A row of the table.

    Args:
        name: the module's.
        kind: its type.
        shape: of its output for one image, channels last: (H, W, C), or (N, C) for N visible cells.
        parameters: all below it.
        multiply_adds: all below it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def layers(
    model: FCMAE | ConvNeXtV2, img_size: tuple[int, int], mask_ratio: float | None = None, *, leaves: bool = False
) -> list[Layer]:
    """The rows for one image; they add up to the whole network. Works on the meta device.

    Args:
        model: a classifier, or a masked autoencoder.
        img_size: (H, W), divisible by the patch size.
        mask_ratio: of a masked autoencoder; None takes its own.
        leaves: single layers instead of stem, downsamplings, blocks and head.

    Raises:
        ValueError: if the image size or the mask ratio does not fit.
    """
    encoder = model.encoder if isinstance(model, FCMAE) else model
    patch = encoder.encoder_config.patch_size
    check_image_size(img_size, patch)
    grid = img_size[0] // patch, img_size[1] // patch
    patches = grid[0] * grid[1]
    rows: list[Layer] = []
    if isinstance(model, FCMAE):
        keep = keep_count(patches, model.config.mask_ratio if mask_ratio is None else mask_ratio)
        rows += _encoder_rows(encoder, "encoder.", leaves, grid, keep)
        rows += _unit("proj", model.proj, (keep,), leaves)
        rows.append(Layer("mask_token", "Parameter", tuple(model.mask_token.shape), model.mask_token.numel(), 0))
        for index, block in enumerate(model.decoder):
            rows += _unit(f"decoder.{index}", block, grid, leaves)
        rows += _unit("pred", model.pred, grid, leaves)
    else:
        rows += _encoder_rows(encoder, "", leaves, grid, None)
        rows += _unit("norm", model.norm, (), leaves)
        if isinstance(model.head, nn.Linear):
            rows += _unit("head", model.head, (), leaves)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    return rows


def _encoder_rows(
    encoder: Encoder, prefix: str, leaves: bool, grid: tuple[int, int], keep: int | None
) -> Iterator[Layer]:
    for stage, blocks in enumerate(encoder.stages):
        side = 8 >> stage
        cells = (grid[0] * side, grid[1] * side) if keep is None else (keep * side * side,)
        # A downsampling first normalises the cells of the stage above.
        above = tuple(n * 2 for n in cells) if keep is None else (cells[0] * 4,)
        name = f"{prefix}downsample_layers.{stage}"
        yield from _unit(name, encoder.downsample_layers[stage], cells, leaves, above if stage else cells)
        for index, block in enumerate(blocks.children()):
            yield from _unit(f"{prefix}stages.{stage}.{index}", block, cells, leaves)


def _unit(
    name: str, module: nn.Module, cells: tuple[int, ...], leaves: bool, norm_cells: tuple[int, ...] | None = None
) -> Iterator[Layer]:
    """One row for ``module``, or one for each layer in it that has parameters. ``cells`` are its output positions."""
    parts = []
    for part, layer in module.named_modules():
        own = sum(p.numel() for p in layer.parameters(recurse=False))
        if own:
            where = norm_cells if norm_cells is not None and isinstance(layer, nn.LayerNorm) else cells
            full = f"{name}.{part}" if part else name
            parts.append(Layer(full, type(layer).__name__, (*where, _width(layer)), own, _work(layer, cells)))
    if leaves:
        yield from parts
    else:
        total, work = sum(p.parameters for p in parts), sum(p.multiply_adds for p in parts)
        # The output is as wide as the last layer that mixes channels, a lone normalisation as its input.
        mixing = [p for p in parts if p.kind in ("Conv2d", "Linear")] or parts
        yield Layer(name, type(module).__name__, (*cells, mixing[-1].shape[-1]), total, work)


def _width(layer: nn.Module) -> int:
    weight = getattr(layer, "weight", None)
    return int(weight.shape[0] if weight is not None else next(layer.parameters()).shape[-1])


def _work(layer: nn.Module, cells: tuple[int, ...]) -> int:
    """Multiply-adds: each weight of a convolution or linear layer is used once at every output position."""
    return layer.weight.numel() * math.prod(cells) if isinstance(layer, nn.Conv2d | nn.Linear) else 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build on the meta device, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", help=f"{next(iter(VARIANTS))} … {list(VARIANTS)[-1]}, or a checkpoint")
    parser.add_argument("--fcmae", action="store_true", help="the masked autoencoder of a variant, not its classifier")
    parser.add_argument("--img-size", type=_cli.image_size, help="pixels, 224 or 192x256; default: 224, or the model's")
    parser.add_argument("--patch-size", type=_cli.positive_int, default=32, help="of a variant: 32, 16 or 8")
    parser.add_argument("--in-chans", type=_cli.positive_int, default=3, help="channels of a variant's images")
    parser.add_argument("--num-classes", type=int, default=1000, help="outputs of a variant's head; 0: no head")
    parser.add_argument("--mask-ratio", type=float, help="of a masked autoencoder; default: the model's, 0.6")
    parser.add_argument("--layers", action="store_true", help="list single layers instead of blocks")
    options = parser.parse_args(arguments)
    model = build(options)
    default = model.config.img_size if isinstance(model, FCMAE) else (224, 224)
    img_size = options.img_size or default
    if options.mask_ratio is not None and not isinstance(model, FCMAE):
        parser.error("--mask-ratio is for a masked autoencoder; a classifier masks nothing (see --fcmae)")
    report(layers(model, img_size, options.mask_ratio, leaves=options.layers), img_size)


def build(options: argparse.Namespace) -> FCMAE | ConvNeXtV2:
    """The network asked for, without memory for its weights."""
    path = Path(options.model)
    if not path.exists():
        if path.suffix or len(path.parts) > 1:
            raise CheckpointError(f"{path}: no such checkpoint")
        encoder = encoder_config(options.model, in_chans=options.in_chans, patch_size=options.patch_size)
        with torch.device("meta"):
            if options.fcmae:
                return create_fcmae(
                    encoder,
                    img_size=options.img_size or 224,
                    mask_ratio=0.6 if options.mask_ratio is None else options.mask_ratio,
                )
            return create_model(encoder, num_classes=options.num_classes)
    config = load_checkpoint(path).config
    with torch.device("meta"):
        if isinstance(config, FCMAEConfig):
            return FCMAE(config)
        if isinstance(config, ClassifierConfig):
            return ConvNeXtV2(config)
    return load_model(path)


def report(rows: Sequence[Layer], img_size: tuple[int, int]) -> None:
    """Print the table and its sums."""
    width = max(len(row.name) for row in rows)
    kind = max(len(row.kind) for row in rows)
    _cli.say(f"{'layer':<{width}}  {'type':<{kind}}  {'output':<18}  {'parameters':>12}  {'multiply-adds':>16}")
    for row in rows:
        shape = "×".join(map(str, row.shape))
        _cli.say(
            f"{row.name:<{width}}  {row.kind:<{kind}}  {shape:<18}  {row.parameters:>12,}  {row.multiply_adds:>16,}"
        )
    parameters, work = sum(row.parameters for row in rows), sum(row.multiply_adds for row in rows)
    _cli.say(
        f"one image of {img_size[0]}×{img_size[1]} pixels: {parameters:,} parameters, {work / 1e9:.3g} G multiply-adds"
    )


if __name__ == "__main__":
    _cli.run(main)

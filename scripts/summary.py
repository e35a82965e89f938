"""List the layers of a network: output shape, parameters and multiply-adds of one image.

Multiply-adds are those of convolutions (at every tap) and linear layers; normalisation is not counted. For a masked
autoencoder the encoder's are those of the visible cells alone, the decoder's those of every patch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import _cli
import torch

from convnextv2 import FCMAE, VARIANTS, ConvNeXtV2, create_fcmae, create_model
from convnextv2.models.config import ClassifierConfig, FCMAEConfig, encoder_config
from convnextv2.models.summary import Layer, layers
from convnextv2.weights.checkpoint import CheckpointError, load_checkpoint
from convnextv2.weights.loading import complete_model
from convnextv2.weights.reading import read_checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build on the meta device, print."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
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
    checkpoint = load_checkpoint(path)
    config = checkpoint.config
    read_checkpoint(checkpoint)  # a configuration that the weights are not of may have any number of layers
    with torch.device("meta"):
        if isinstance(config, FCMAEConfig):
            return FCMAE(config)
        if isinstance(config, ClassifierConfig):
            return ConvNeXtV2(config)
    return complete_model(checkpoint)


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

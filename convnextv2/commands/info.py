"""Say what a network is made of: layers with output shapes, parameters and multiply-adds, FLOPs, and published figures.

NAME is a variant, a published checkpoint's name (convnextv2_nano_22k_384_ema), or a checkpoint that is there.
Multiply-adds are those of convolutions (at every tap) and linear layers for one image; normalisation is not counted.
For a masked autoencoder the encoder's are those of the visible cells alone, the decoder's those of every patch; what
pre-training spends under a mask is said beside what every patch would take, stage by stage. Published FLOPs are
multiply-adds; torch counts two for each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnextv2 import VARIANTS
from convnextv2.commands import _cli
from convnextv2.models.config import ClassifierConfig, EncoderConfig, FCMAEConfig, encoder_config

if TYPE_CHECKING:
    from convnextv2 import FCMAE, ConvNeXtV2
    from convnextv2.models.spent import UnderAMask
    from convnextv2.models.summary import Layer
    from convnextv2.weights.figures import Beside
    from convnextv2.weights.zoo import PublishedCheckpoint

MASK_RATIO = 0.6
"""Of pre-training, where neither an option nor a checkpoint says another."""


@dataclass(frozen=True)
class Network:
    """What was named: a network without memory for its weights, its image size, and what was published of it."""

    model: FCMAE | ConvNeXtV2
    img_size: tuple[int, int]
    published: Sequence[PublishedCheckpoint]
    pretrains: bool
    """Whether it is a name, whose pre-training is told too."""

    @property
    def encoder(self) -> EncoderConfig:
        """Its encoder's configuration."""
        return self.model.config.encoder


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build on the meta device, count, print."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    variants = f"{next(iter(VARIANTS))} … {list(VARIANTS)[-1]}"
    text = f"{variants}, a published checkpoint's name, or a checkpoint: file, run folder, address"
    parser.add_argument("model", metavar="NAME", help=text)
    parser.add_argument("--fcmae", action="store_true", help="the masked autoencoder of a variant, not its classifier")
    parser.add_argument("--img-size", type=_cli.image_size, help="pixels, 224 or 192x256; default: 224, or the model's")
    text = "of a variant: 32, 16 or 8; default: 32"
    parser.add_argument("--patch-size", type=_cli.positive_int, help=text)
    parser.add_argument("--in-chans", type=_cli.positive_int, help="channels of a variant's images; default: 3")
    parser.add_argument("--num-classes", type=int, help="outputs of a variant's head; 0: no head; default: 1000")
    parser.add_argument("--mask-ratio", type=float, help="of pre-training; default: the model's, 0.6")
    parser.add_argument("--layers", action="store_true", help="list single layers instead of blocks")
    parser.add_argument("--json", action="store_true", help="all of it as JSON, on standard output")
    options = parser.parse_args(arguments)

    from convnextv2 import FCMAE
    from convnextv2.models.summary import layers
    from convnextv2.weights.figures import beside

    network = build(options)
    refuse_unused(parser, options, network)
    masked = isinstance(network.model, FCMAE)
    if options.mask_ratio is not None and not (masked or network.pretrains):
        parser.error("--mask-ratio is for a masked autoencoder; a classifier masks nothing (see --fcmae)")
    ratio = options.mask_ratio if masked else None
    rows = layers(network.model, network.img_size, ratio, leaves=options.layers)
    mask, why_not = mask_of(network, options.mask_ratio)
    figures = [beside(file) for file in network.published]
    flops = counted_by_torch(network, rows)
    if options.json:
        _cli.say(json.dumps(as_json(options.model, network, rows, flops, figures, mask), indent=2))
        return
    report_layers(rows)
    if figures:
        report_published(figures)
    if mask is not None:
        report_mask(mask)
    elif why_not:
        _cli.say(f"\nunder a mask: not at this size: {why_not}")
    parameters, work = sum(row.parameters for row in rows), sum(row.multiply_adds for row in rows)
    taps = ", and the taps of sparse convolutions, which it does not know" if masked else ""
    _cli.say(f"\nFLOPs by torch.utils.flop_counter{taps}: {flops / 1e9:.4g} G, two for each multiply-add")
    height, width = network.img_size
    _cli.say(f"one image of {height}×{width} pixels: {parameters:,} parameters, {work / 1e9:.3g} G multiply-adds")


def refuse_unused(parser: argparse.ArgumentParser, options: argparse.Namespace, network: Network) -> None:
    """End the program if an option says what the network that was named has settled."""
    from convnextv2 import FCMAE

    shape = "fcmae", "patch_size", "in_chans", "num_classes"
    of_a_name = shape[-1:] if isinstance(network.model, FCMAE) else ()
    for name in of_a_name if network.pretrains else shape:
        if getattr(options, name) not in (None, False):
            kind = "a masked autoencoder" if network.pretrains else "a checkpoint, which says what it is"
            parser.error(f"--{name.replace('_', '-')} is not for {kind}")


def build(options: argparse.Namespace) -> Network:
    """The network asked for, without memory for its weights."""
    import torch

    from convnextv2 import FCMAE, create_fcmae, create_model
    from convnextv2.weights.checkpoint import CheckpointError
    from convnextv2.weights.figures import published_of
    from convnextv2.weights.names import is_name
    from convnextv2.weights.zoo import PUBLISHED

    path = Path(options.model)
    if path.exists() or (options.model not in PUBLISHED and is_name(options.model)):
        model = of_checkpoint(options.model)
        size = options.img_size or (model.config.img_size if isinstance(model, FCMAE) else (224, 224))
        return Network(model, size, published_of(model.config.encoder), False)
    file = PUBLISHED.get(options.model)
    if file is None and (path.suffix or len(path.parts) > 1):
        raise CheckpointError(f"{path}: no such checkpoint")
    variant = options.model if file is None else file.variant
    encoder = encoder_config(variant, in_chans=options.in_chans or 3, patch_size=options.patch_size or 32)
    size = options.img_size or ((224, 224) if file is None else (file.resolution, file.resolution))
    known = published_of(encoder)
    if file is not None and file.flops is not None:
        known = [file] if known else []
    with torch.device("meta"):
        if options.fcmae or (file is not None and file.kind == "fcmae"):
            ratio = MASK_RATIO if options.mask_ratio is None else options.mask_ratio
            return Network(create_fcmae(encoder, img_size=size, mask_ratio=ratio), size, known, True)
        classes = 1000 if options.num_classes is None else options.num_classes
        return Network(create_model(encoder, num_classes=classes), size, known, True)


def of_checkpoint(given: str) -> FCMAE | ConvNeXtV2:
    """The network of a checkpoint, without memory where the file says what it is."""
    import torch

    from convnextv2 import FCMAE, ConvNeXtV2
    from convnextv2.weights.checkpoint import load_checkpoint
    from convnextv2.weights.loading import complete_model
    from convnextv2.weights.reading import read_checkpoint

    checkpoint = load_checkpoint(given)
    config = checkpoint.config
    read_checkpoint(checkpoint)  # a configuration that the weights are not of may have any number of layers
    with torch.device("meta"):
        if isinstance(config, FCMAEConfig):
            return FCMAE(config)
        if isinstance(config, ClassifierConfig):
            return ConvNeXtV2(config)
    return complete_model(checkpoint)


def mask_of(network: Network, mask_ratio: float | None) -> tuple[UnderAMask | None, str]:
    """What pre-training spends; or nothing, and why, where no ratio was asked for and the size cannot be masked."""
    from convnextv2 import FCMAE
    from convnextv2.models.spent import under_a_mask

    if isinstance(network.model, FCMAE):
        return under_a_mask(network.model.config, network.img_size, mask_ratio), ""
    if not network.pretrains:
        return None, ""
    try:
        config = FCMAEConfig(network.encoder, network.img_size, MASK_RATIO if mask_ratio is None else mask_ratio)
        return under_a_mask(config, network.img_size), ""
    except ValueError as error:
        if mask_ratio is not None:
            raise
        return None, str(error)


def counted_by_torch(network: Network, rows: Sequence[Layer]) -> int:
    """FLOPs of one image: of a classifier in a pass of its own, without our rows; else of these."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from convnextv2 import FCMAE

    if isinstance(network.model, FCMAE):
        return 2 * sum(row.multiply_adds for row in rows)
    device = next(network.model.parameters()).device
    images = torch.empty(1, network.encoder.in_chans, *network.img_size, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.model(images)
    return counter.get_total_flops()


def as_json(
    name: str, network: Network, rows: Sequence[Layer], flops: int, figures: Sequence[Beside], mask: UnderAMask | None
) -> dict[str, Any]:
    """All of it as JSON has it; a part that does not apply is null or empty."""
    published = [
        {
            "name": one.file.name,
            "resolution": one.file.resolution,
            "published": {"parameters_m": one.file.parameters, "multiply_adds_g": one.file.flops},
            "ours": {"parameters": one.parameters, "multiply_adds": one.multiply_adds},
            "same_parameters": one.same_parameters,
            "difference": one.difference,
        }
        for one in figures
    ]
    under = None
    if mask is not None:
        parts = [*mask.parts, mask.encoder, mask.whole]
        under = {
            "mask_ratio": mask.mask_ratio,
            "visible_patches": mask.visible,
            "patches": mask.patches,
            "parts": [{**asdict(part), "share": part.share} for part in parts],
        }
    return {
        "model": name,
        "kind": type(network.model).__name__,
        "img_size": list(network.img_size),
        "parameters": sum(row.parameters for row in rows),
        "multiply_adds": sum(row.multiply_adds for row in rows),
        "flops": flops,
        "layers": [asdict(row) for row in rows],
        "published": published,
        "under_a_mask": under,
    }


def table(rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print rows in columns: the first ``left`` of them flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            f"{cell:{'<' if place < left else '>'}{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        _cli.say("  ".join(cells).rstrip())


def report_layers(rows: Sequence[Layer]) -> None:
    """Print the table of layers."""
    cells = [
        (row.name, row.kind, "×".join(map(str, row.shape)), f"{row.parameters:,}", f"{row.multiply_adds:,}")
        for row in rows
    ]
    table([("layer", "type", "output", "parameters", "multiply-adds"), *cells], left=3)


def report_published(figures: Sequence[Beside]) -> None:
    """Print what was published of the classifier beside ours."""
    _cli.say("\nthe classifier of 1,000 classes, as published and here:")
    heading = "published checkpoint", "pixels", "parameters", "here", "multiply-adds", "here", "difference"
    cells = [
        (
            one.file.name,
            f"{one.file.resolution}",
            f"{one.file.parameters:g} M",
            f"{one.parameters:,}",
            f"{one.file.flops:g} G",
            f"{one.multiply_adds / 1e9:.4g} G",
            f"{one.difference:+.2%}",
        )
        for one in figures
    ]
    table([heading, *cells])


def report_mask(mask: UnderAMask) -> None:
    """Print what pre-training spends, stage by stage."""
    ratio = f"mask ratio {mask.mask_ratio:g}, {mask.visible} of {mask.patches} patches visible"
    _cli.say(f"\nforward in pre-training, {ratio}:")
    cells = [
        (part.name, f"{part.dense:,}", f"{part.spent:,}", f"{part.share:.1%}", f"{part.spent / mask.whole.spent:.1%}")
        for part in (*mask.parts, mask.encoder, mask.whole)
    ]
    table([("part", "multiply-adds of every patch", "spent", "spent of it", "of all spent"), *cells])

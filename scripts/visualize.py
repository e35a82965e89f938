"""Draw what a pre-training checkpoint makes of images.

One row an image: original, masked, prediction, and prediction with the visible patches pasted back. A mask file is a
grid of text, a line for a row of patches: 1 or # is masked, 0 or . is visible.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import _cli
import torch

from convnextv2 import FCMAE
from convnextv2.data import DataError, build_predict_dataset
from convnextv2.data.decoding import Wanted
from convnextv2.models.config import check_image_size
from convnextv2.models.masking import parse_mask
from convnextv2.outputs import check_output, is_stream
from convnextv2.training.pictures import PICTURE, reconstruction_panels, save_reconstructions
from convnextv2.weights.checkpoint import CheckpointError, load_checkpoint
from convnextv2.weights.loading import load_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load, draw."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a pre-training run, or its run folder")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, and folders of images")
    _cli.add_output(parser, "reconstructions.png", "PNG file to write, - for standard output")
    parser.add_argument("--mask-ratio", type=float, help="share of the patches to mask; default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random masks")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="text grid to use as the mask of every image")
    parser.add_argument(
        "--max-images", type=_cli.positive_int, default=8, help="rows to draw at most, taken evenly from what is given"
    )
    parser.add_argument("--img-size", type=_cli.image_size, help="pixels, 224 or 192x256; default: the checkpoint's")
    parser.add_argument("--device", type=_cli.device, default="auto", help="cpu, cuda, cuda:1, or auto")
    parser.add_argument("--backend", default="auto", help="backend of the sparse convolution (python -m sparse_ops)")
    _cli.add_max_pixels(parser)
    options = parser.parse_args(arguments)
    if options.mask is not None and options.mask_ratio is not None:
        parser.error("give --mask or --mask-ratio, not both")
    inputs = [options.checkpoint, *options.images, *([options.mask] if options.mask else [])]
    check_output(options.output, PICTURE, inputs=inputs, overwrite=options.overwrite)

    checkpoint = load_checkpoint(options.checkpoint)
    model = load_model(checkpoint.path, backend=options.backend, device=options.device)
    if not isinstance(model, FCMAE):
        raise CheckpointError(f"{checkpoint.path}: is a classifier; expected a checkpoint of scripts/pretrain.py")
    encoder = model.config.encoder
    mean, std, img_size = checkpoint.preprocessing(encoder.in_chans, model.config.img_size)
    img_size = options.img_size or img_size
    check_image_size(img_size, encoder.patch_size)
    mask = None
    if options.mask is not None:
        mask = read_mask(options.mask, (img_size[0] // encoder.patch_size, img_size[1] // encoder.patch_size))

    wanted = Wanted(options.max_pixels)
    dataset = build_predict_dataset(options.images, img_size, encoder.in_chans, mean, std, wanted=wanted)
    images, unreadable = dataset.examples(options.max_images)
    _cli.say_skipped([*dataset.skipped, *unreadable])
    if not images:
        raise DataError(f"none of the {len(dataset)} files given is a readable image")
    panels = reconstruction_panels(
        model,
        torch.stack(images),
        None if mask is None else mask.expand(len(images), *mask.shape),
        torch.Generator().manual_seed(options.seed),
        mean=mean,
        std=std,
        mask_ratio=options.mask_ratio,
    )
    save_reconstructions(options.output, *panels)
    report = _cli.warn if is_stream(options.output) else _cli.say
    report(f"{len(images)} reconstructions: {options.output}")


def read_mask(path: Path, grid_size: tuple[int, int]) -> torch.Tensor:
    """Mask ``[gh, gw]`` from a text grid.

    Raises:
        ValueError: if it is no grid of text, or of another size.
    """
    try:
        mask = parse_mask(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if tuple(mask.shape) != grid_size:
        raise ValueError(
            f"{path}: a mask of {mask.shape[0]}×{mask.shape[1]} patches, expected {grid_size[0]}×{grid_size[1]} "
            f"(lines × characters) for these images"
        )
    return mask


if __name__ == "__main__":
    _cli.run(main)

"""Draw what a pre-training checkpoint makes of images.

One row an image: original, masked, prediction, and prediction with the visible patches pasted back. A mask file is a
grid of text, a line for a row of patches: 1 or # is masked, 0 or . is visible.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convnextv2.commands import _cli
from convnextv2.data import DataError
from convnextv2.data.decoding import Wanted
from convnextv2.data.writing import in_type, write_tiff
from convnextv2.models.config import check_image_size
from convnextv2.outputs import check_output, is_stream

if TYPE_CHECKING:
    import torch

    from convnextv2 import FCMAE
    from convnextv2.data import PredictDataset
    from convnextv2.data.transforms import Statistics


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load, draw."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", type=_cli.checkpoint, help="of a pre-training: file, run folder or address")
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
    parser.add_argument(
        "--tiff", type=Path, metavar="FOLDER", help="also write prediction + visible of native images, in their units"
    )
    _cli.add_max_pixels(parser)
    _cli.add_window(parser)
    options = parser.parse_args(arguments)

    import torch

    from convnextv2 import FCMAE
    from convnextv2.data import build_predict_dataset
    from convnextv2.data.reading import as_trained, display_ranges, shown
    from convnextv2.training.pictures import PICTURE, reconstruction_panels, save_reconstructions
    from convnextv2.weights.checkpoint import CheckpointError, load_checkpoint
    from convnextv2.weights.loading import load_model

    if options.mask is not None and options.mask_ratio is not None:
        parser.error("give --mask or --mask-ratio, not both")
    inputs = [options.checkpoint, *options.images, *([options.mask] if options.mask else [])]
    check_output(options.output, PICTURE, inputs=inputs, overwrite=options.overwrite)

    checkpoint = load_checkpoint(options.checkpoint)
    model = load_model(checkpoint.path, backend=options.backend, device=options.device)
    if not isinstance(model, FCMAE):
        raise CheckpointError(f"{checkpoint.path}: is a classifier; expected a checkpoint of fcmae pretrain")
    encoder = model.config.encoder
    mean, std, img_size = checkpoint.preprocessing(encoder.in_chans, model.config.img_size)
    img_size = options.img_size or img_size
    check_image_size(img_size, encoder.patch_size)
    mask = None
    if options.mask is not None:
        mask = read_mask(options.mask, (img_size[0] // encoder.patch_size, img_size[1] // encoder.patch_size))

    wanted = as_trained(Wanted(options.max_pixels, window=options.window), checkpoint.metadata)
    if options.tiff is not None and not wanted.native:
        raise ValueError("--tiff is for checkpoints of native images; this one's are photographs of 8 bits")
    dataset = build_predict_dataset(options.images, img_size, encoder.in_chans, mean, std, wanted=wanted)
    chosen, images, unreadable = dataset.numbered_examples(options.max_images)
    _cli.say_skipped([*dataset.skipped, *unreadable])
    if not images:
        raise DataError(f"none of the {len(dataset)} files given is a readable image")
    ranges = display_ranges(checkpoint.metadata, (mean, std))
    in_pictures = shown((mean, std), ranges) if wanted.native else (mean, std)
    panels, masks = reconstruction_panels(
        model,
        torch.stack(images),
        None if mask is None else mask.expand(len(images), *mask.shape),
        torch.Generator().manual_seed(options.seed),
        mean=in_pictures[0],
        std=in_pictures[1],
        mask_ratio=options.mask_ratio,
    )
    save_reconstructions(options.output, panels, masks)
    report = _cli.warn if is_stream(options.output) else _cli.say
    report(f"{len(images)} reconstructions: {options.output}")
    if options.tiff is not None:
        write_reconstructions(options.tiff, model, dataset, chosen, torch.stack(images), masks, (mean, std))
        report(f"{len(images)} TIFF files: {options.tiff}")


def write_reconstructions(
    folder: Path,
    model: FCMAE,
    dataset: PredictDataset,
    chosen: Sequence[int],
    images: torch.Tensor,
    masks: torch.Tensor,
    statistics: Statistics,
) -> None:
    """Prediction with the visible patches pasted back, in the units and the type of each file, one TIFF an image."""
    import torch

    from convnextv2.models.fcmae import pixel_mask
    from convnextv2.models.modes import evaluation_mode

    device, patch = next(model.parameters()).device, model.config.encoder.patch_size
    with torch.no_grad(), evaluation_mode(model):
        predicted = model.reconstruct(images.to(device), model(images.to(device), masks.to(device)).pred).cpu()
    hidden = pixel_mask(masks, (images.shape[2] // patch, images.shape[3] // patch), patch)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in statistics)
    pasted = torch.where(hidden > 0, predicted, images).double() * std + mean
    for number, values in zip(chosen, pasted, strict=True):
        dtype = dataset.load(number).values.dtype
        name = f"{dataset.files[number].stem}.{number:04d}.tif"
        write_tiff(folder / name, in_type(values.numpy(), dtype))


def read_mask(path: Path, grid_size: tuple[int, int]) -> torch.Tensor:
    """Mask ``[gh, gw]`` from a text grid.

    Raises:
        ValueError: if it is no grid of text, or of another size.
    """
    from convnextv2.models.masking import parse_mask

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

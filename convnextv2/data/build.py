"""Data sets for a task, from what the user names: a folder, files, or the embedded digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convnextv2.data.datasets import ImageDataset, PredictDataset
from convnextv2.data.digits import DIGITS, DigitsSource, _digits
from convnextv2.data.folders import _walk, _why_unusable, scan_images
from convnextv2.data.images import has_image_suffix
from convnextv2.data.sources import DataError, FileSource, Source, stratified_split
from convnextv2.data.transforms import (
    Augmentation,
    Transform,
    check_statistics,
    default_statistics,
    eval_transform,
    train_transform,
)

STATISTICS_SAMPLE = 256
"""Images from which mean and standard deviation are computed where there is no default."""


def build_pretrain_dataset(
    data: str | Path,
    img_size: tuple[int, int],
    in_chans: int = 3,
    *,
    seed: int = 0,
    val_fraction: float = 0.2,
    augmentation: Augmentation | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageDataset:
    """Images for pre-training, without labels: random resized crop (scale 0.2–1, bicubic) and horizontal flip.

    Images that :func:`build_finetune_datasets` validates on stay out where that is known: of a folder with ``train``
    and ``val`` subfolders only ``train`` is taken, and of the digits only the training part for this ``seed`` and
    ``val_fraction``. Of any other folder every image is taken.

    Args:
        data: a folder, or ``digits`` (crops of scale 0.5–1, no flip).
        img_size: (H, W) in pixels.
        in_chans: channels, 1 and 3 for pictures, others for ``.npy`` and TIFF.
        seed: of the augmentation, and of the digits' split.
        val_fraction: of the digits.
        augmentation: replaces the defaults.
        mean, std: normalisation; by default :func:`~.transforms.default_statistics`, computed from the images
            for other than 1 or 3 channels.

    Raises:
        DataError: if there is no usable image.
    """
    img_size = _check_size(img_size)
    if str(data) == DIGITS:
        digits, labels = _digits()
        chosen, _ = stratified_split(labels, val_fraction, seed)
        source: Source = DigitsSource(digits[chosen], img_size, in_chans)
        about = f"handwritten digits, training part, {len(chosen)} images of 8×8 enlarged"
        skipped: list[tuple[Path, str]] = []
    else:
        root = _train_folder(Path(data))
        listing = scan_images(root, in_chans=in_chans)
        source, skipped = FileSource(listing.paths, in_chans), listing.skipped
        about = f"{root}: {len(listing.paths)} images"
    mean, std = _statistics(source, in_chans, mean, std)
    transform = _augmenting(data, img_size, mean, std, augmentation, crop=(0.2, 1.0))
    plain = eval_transform(img_size, mean, std)
    return ImageDataset(source, transform, plain, mean=mean, std=std, seed=seed, skipped=skipped, description=about)


def build_finetune_datasets(
    data: str | Path,
    img_size: tuple[int, int],
    in_chans: int = 3,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    augmentation: Augmentation | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation part of a labelled data set.

    Args:
        data: a folder with one subfolder a class, split at random by class; or one with ``train`` and ``val``
            subfolders that hold the class folders; or ``digits``.
        img_size: (H, W) in pixels.
        in_chans: as in :func:`build_pretrain_dataset`.
        val_fraction: share of every class for validation, where the folders do not decide.
        seed: of the split and the augmentation.
        augmentation: of the training part; crops of scale 0.08–1 and flips by default (digits: 0.5–1, no flip).
        mean, std: as in :func:`build_pretrain_dataset`; give the checkpoint's where there is one.

    Raises:
        DataError: if there is no usable image, fewer than two classes, or a class to validate that is not trained.
    """
    img_size = _check_size(img_size)
    if str(data) == DIGITS:
        digits, labels = _digits()
        parts = stratified_split(labels, val_fraction, seed)
        classes = [str(digit) for digit in range(10)]
        sources: list[Source] = [DigitsSource(digits[part], img_size, in_chans) for part in parts]
        targets = [[labels[i] for i in part] for part in parts]
        skipped: list[list[tuple[Path, str]]] = [[], []]
        about = "handwritten digits"
    else:
        root = Path(data)
        about = str(root)
        if (root / "train").is_dir() and (root / "val").is_dir():
            listings = [scan_images(root / part, in_chans=in_chans, labelled=True) for part in ("train", "val")]
            classes = listings[0].classes
            unknown = sorted(set(listings[1].classes) - set(classes))
            if unknown:
                raise DataError(f"{root / 'val'}: holds classes that {root / 'train'} does not: {', '.join(unknown)}")
            sources = [FileSource(listing.paths, in_chans) for listing in listings]
            targets = [
                [classes.index(listing.classes[label]) for label in listing.labels or []] for listing in listings
            ]
            skipped = [listing.skipped for listing in listings]
        else:
            listing = scan_images(root, in_chans=in_chans, labelled=True)
            assert listing.labels is not None
            classes = listing.classes
            parts = stratified_split(listing.labels, val_fraction, seed)
            sources = [FileSource([listing.paths[i] for i in part], in_chans) for part in parts]
            targets = [[listing.labels[i] for i in part] for part in parts]
            skipped = [listing.skipped, []]
        _check_classes(root, classes)
        if not len(sources[1]):
            raise DataError(f"{root}: no class has a second image to validate on; expected at least two images a class")
    mean, std = _statistics(sources[0], in_chans, mean, std)
    plain = eval_transform(img_size, mean, std)
    transforms = _augmenting(data, img_size, mean, std, augmentation, crop=(0.08, 1.0)), plain
    names = "training", "validation"
    train, val = (
        ImageDataset(
            sources[i],
            transforms[i],
            plain,
            labels=targets[i],
            classes=classes,
            mean=mean,
            std=std,
            seed=seed,
            skipped=skipped[i],
            description=f"{about}, {names[i]} part: {len(sources[i])} images of {len(classes)} classes",
        )
        for i in range(2)
    )
    return train, val


def build_predict_dataset(
    inputs: Sequence[str | Path],
    img_size: tuple[int, int],
    in_chans: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> PredictDataset:
    """Images to classify, in the order of their names, each once.

    Unreadable images are kept: they are reported where they are loaded, so that the results are complete. Files found
    in a folder that neither are images nor are called like one (notes, tables) are listed in ``skipped`` instead.

    Args:
        inputs: files and folders (searched at all depths).
        img_size: (H, W) in pixels.
        in_chans: channels.
        mean, std: normalisation, from the checkpoint.

    Raises:
        DataError: if an input does not exist, or there is no file at all.
    """
    img_size = _check_size(img_size)
    check_statistics(mean, std, in_chans)
    files: set[Path] = set()
    skipped: list[tuple[Path, str]] = []
    for given in map(Path, inputs):
        if given.is_dir():
            found: list[tuple[Path, int]] = []
            _walk(given, (), found, skipped)
            for path, _ in found:
                reason = None if has_image_suffix(path) else _why_unusable(path, in_chans, full=False)
                if reason is None:
                    files.add(path)
                else:
                    skipped.append((path, reason))
        elif given.is_file():
            files.add(given)
        else:
            raise DataError(f"{given}: {'not a regular file' if given.exists() else 'no such file or folder'}")
    if not files:
        raise DataError(f"{', '.join(map(str, inputs)) or 'no input given'}: looked for image files and found none")
    return PredictDataset(sorted(files), eval_transform(img_size, mean, std), (in_chans, *img_size), skipped)


def _train_folder(root: Path) -> Path:
    return root / "train" if (root / "train").is_dir() and (root / "val").is_dir() else root


def _check_classes(root: Path, classes: Sequence[str]) -> None:
    if len(classes) < 2:
        raise DataError(
            f"{root}: a classifier needs at least two classes (one subfolder each), found only {classes[0]!r}"
        )


def _check_size(img_size: tuple[int, int]) -> tuple[int, int]:
    if len(img_size) != 2 or any(side < 1 for side in img_size):
        raise ValueError(f"img_size must be (height, width) in pixels, got {img_size}")
    return int(img_size[0]), int(img_size[1])


def _augmenting(
    data: str | Path,
    img_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: Augmentation | None,
    crop: tuple[float, float],
) -> Transform:
    """The training transform; digits keep their handedness and most of their area."""
    if str(data) == DIGITS:
        return train_transform(
            img_size, mean, std, augmentation or Augmentation(), crop_scale=(max(crop[0], 0.5), 1.0), hflip=0.0
        )
    return train_transform(img_size, mean, std, augmentation or Augmentation(), crop_scale=crop, hflip=0.5)


def _statistics(
    source: Source, in_chans: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if (mean is None) != (std is None):
        raise ValueError("give both mean and std, or neither")
    if mean is not None and std is not None:
        check_statistics(mean, std, in_chans)
        return tuple(mean), tuple(std)
    known = default_statistics(in_chans)
    return known if known is not None else _measure(source)


def _measure(source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over up to :data:`STATISTICS_SAMPLE` images, spread evenly."""
    chosen = np.unique(np.linspace(0, len(source) - 1, STATISTICS_SAMPLE).round().astype(int))
    count, total, squares = 0, 0.0, 0.0
    for index in chosen:
        pixels = np.asarray(source.load(int(index)), dtype=np.float64)
        pixels = pixels.reshape(-1, pixels.shape[-1])
        count += len(pixels)
        total += pixels.sum(0)
        squares += np.square(pixels).sum(0)
    mean = np.asarray(total) / count
    std = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 0))
    return tuple(mean.tolist()), tuple(np.where(std > 1e-6, std, 1.0).tolist())

"""Data sets for a task, from what the user names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from convnextv2.data.datasets import ImageDataset, PredictDataset
from convnextv2.data.decoding import USUAL, Size, Wanted, is_zarr
from convnextv2.data.images import has_image_suffix, why_unusable
from convnextv2.data.listings import walk_files
from convnextv2.data.opening import open_source
from convnextv2.data.reading import plain_transform, prepared_by, with_statistics
from convnextv2.data.sources import DataError
from convnextv2.data.transforms import Augmentation, check_statistics
from convnextv2.data.windows import predict_dataset, training_set

Numbers = Sequence[float]


def build_pretrain_dataset(
    data: str | Path,
    img_size: tuple[int, int],
    in_chans: int = 3,
    *,
    seed: int = 0,
    val_fraction: float = 0.2,
    augmentation: Augmentation | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    wanted: Wanted = USUAL,
) -> ImageDataset:
    """Images for pre-training, without labels: random resized crop (scale 0.2–1, bicubic) and horizontal flip.

    Images that :func:`build_finetune_datasets` validates on stay out where that is known: of a folder with ``train``
    and ``val`` subfolders only ``train`` is taken, and of a source that says so (:attr:`OpenedSource.hold_out`, the
    digits do) only the training part for this ``seed`` and ``val_fraction``. Of any other every image is taken.
    Raises DataError if there is no usable image.

    Args:
        data: as ``spec`` of :func:`open_source`; the source may ask for gentler crops, and for no flip.
        img_size: (H, W) in pixels.
        in_chans: channels, 1 and 3 for pictures, others for ``.npy`` and TIFF.
        seed: of the augmentation, and of the split of what is held out.
        val_fraction: share of every class that is held out, where the source asks for it.
        mean, std: normalisation; by default :data:`~.transforms.DEFAULT_STATISTICS`, computed from the images
            for other than 1 or 3 channels.
        wanted: what else is wanted of image files, such as a bound on their size.
    """
    img_size = _check_size(img_size)
    opened = open_source(data, in_chans=in_chans, img_size=img_size, wanted=with_statistics(wanted, mean))
    part, about = opened.train, opened.description
    if opened.hold_out:
        part, about = opened.split(val_fraction, seed)[0], f"{about}, training part"
    statistics, bad, transform = prepared_by(data, opened, part, in_chans, mean, std)
    augmenting = transform(img_size, *statistics, opened.augmentation("pretrain", augmentation))
    plain = transform(img_size, *statistics)
    part = replace(part, labels=None)
    return training_set(part)(part, augmenting, plain, statistics, seed=seed, what=about, bad=bad)


def build_finetune_datasets(
    data: str | Path,
    img_size: tuple[int, int],
    in_chans: int = 3,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    augmentation: Augmentation | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    wanted: Wanted = USUAL,
) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation part of a labelled data set.

    Args:
        data: as ``spec`` of :func:`open_source`. A folder has one subfolder a class, and is split at random by class;
            or ``train`` and ``val`` subfolders that hold the class folders.
        img_size, in_chans, mean, std, wanted: as in :func:`build_pretrain_dataset`; mean, std of a checkpoint if any.
        val_fraction: share of every class for validation, where the folders do not decide.
        seed: of the split and the augmentation.
        augmentation: of the training part; crops of scale 0.08–1 and flips unless the source asks for others.

    Raises:
        DataError: if there is no usable image, fewer than two classes, or a class to validate that is not trained.
    """
    img_size = _check_size(img_size)
    wanted = with_statistics(wanted, mean)
    opened = open_source(data, in_chans=in_chans, img_size=img_size, labelled=True, wanted=wanted)
    train, val = opened.split(val_fraction, seed)
    classes = list(opened.classes)
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise DataError(f"{data}: a classifier needs at least two classes (one subfolder each), found {found}")
    if not len(val.by_number):
        raise DataError(f"{data}: no class has a second image to validate on; expected at least two images a class")
    statistics, bad, transform = prepared_by(data, opened, train, in_chans, mean, std)
    augmenting = transform(img_size, *statistics, opened.augmentation("finetune", augmentation))
    plain = transform(img_size, *statistics)
    rest, about = (plain, statistics, classes), opened.description
    return (
        training_set(train)(train, augmenting, *rest, seed=seed, what=f"{about}, training part", bad=bad),
        ImageDataset(val, plain, *rest, seed=seed, what=f"{about}, validation part"),
    )


def build_predict_dataset(
    inputs: Sequence[str | Path], img_size: Size, in_chans: int, mean: Numbers, std: Numbers, wanted: Wanted = USUAL
) -> PredictDataset:
    """Images to classify, in the order of their names, each once.

    Unreadable images are kept: they are reported where they are loaded, so that the results are complete. Files found
    in a folder that neither are images nor are called like one (notes, tables) are listed in ``skipped`` instead.
    Raises DataError if an input does not exist, or there is no file at all.

    Args:
        inputs: files and folders (searched at all depths).
        img_size, in_chans, mean, std, wanted: as :func:`build_pretrain_dataset`, from the checkpoint.
    """
    img_size = _check_size(img_size)
    check_statistics(mean, std, in_chans)
    files, skipped = set[Path](), list[tuple[Path, str]]()
    for given in map(Path, inputs):
        if given.is_dir() and not is_zarr(given):
            for path, _ in walk_files(given, skipped):
                reason = None if has_image_suffix(path) else why_unusable(path, in_chans, False, wanted)
                if reason is None:
                    files.add(path)
                else:
                    skipped.append((path, reason))
        elif given.is_file() or is_zarr(given):
            files.add(given)
        else:
            raise DataError(f"{given}: {'not a regular file' if given.exists() else 'no such file or folder'}")
    if not files:
        raise DataError(f"{', '.join(map(str, inputs)) or 'no input given'}: looked for image files and found none")
    transform, shape = plain_transform(wanted, img_size, mean, std), (in_chans, *img_size)
    return predict_dataset(sorted(files), transform, shape, skipped, wanted)


def _check_size(img_size: tuple[int, int]) -> tuple[int, int]:
    if len(img_size) != 2 or any(side < 1 for side in img_size):
        raise ValueError(f"img_size must be (height, width) in pixels, got {img_size}")
    return int(img_size[0]), int(img_size[1])

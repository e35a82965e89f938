"""Data sets: folders of images, labelled or not, and the embedded handwritten digits.

A folder is read by content, not by file names' endings, and bad files never stop a run. Small folders (up to
:data:`FULL_CHECK_BYTES`) are decoded once when they are scanned; of larger ones only the headers are read. A file that
turns out to be damaged later is replaced by its next readable neighbour in the listing, the same in every run, and
counted in :attr:`ImageDataset.replaced`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from convnextv2.images import UnreadableImageError, check_header, has_image_suffix, load_image
from convnextv2.transforms import (
    Augmentation,
    Transform,
    check_statistics,
    default_statistics,
    eval_transform,
    sample_seed,
    train_transform,
)

FULL_CHECK_BYTES = 256 * 2**20
"""Folders up to this size are decoded whole when scanned, some seconds' work; larger ones are checked by header."""

STATISTICS_SAMPLE = 256
"""Images from which mean and standard deviation are computed where there is no default."""

DIGITS = "digits"


class DataError(ValueError):
    """No usable data; the message says what was looked for, where, and what was found."""


# Scanning ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageListing:
    """What :func:`scan_images` found.

    Args:
        root: the folder.
        paths: usable images, sorted.
        labels: index into ``classes`` of each image, or None if an image lies outside of a class folder.
        classes: sorted names of the subfolders of ``root`` that hold a usable image.
        skipped: what was left out, and why.
    """

    root: Path
    paths: list[Path]
    labels: list[int] | None
    classes: list[str]
    skipped: list[tuple[Path, str]]


def scan_images(folder: str | Path, *, in_chans: int = 3, labelled: bool = False, check: str = "auto") -> ImageListing:
    """Find the usable images below a folder.

    Hidden files and folders (a leading dot) are passed over in silence. Links are followed; loops are not.

    Args:
        folder: searched at all depths; the first subfolder level names the classes.
        in_chans: channels that the images must provide.
        labelled: insist on classes: images directly in ``folder`` are skipped, and so are class folders without a
            usable image (both with a reason).
        check: ``full`` decodes every image, ``header`` reads what comes before the pixels, ``auto`` chooses by
            :data:`FULL_CHECK_BYTES`.

    Raises:
        DataError: if the folder does not exist, cannot be read, or holds no usable image.
    """
    root = Path(folder)
    if check not in ("auto", "full", "header"):
        raise ValueError(f"check must be auto, full or header, got {check!r}")
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; expected a folder of images")
    files: list[tuple[Path, int]] = []
    skipped: list[tuple[Path, str]] = []
    _walk(root, (), files, skipped)
    files.sort()
    if check == "auto":
        check = "full" if sum(size for _, size in files) <= FULL_CHECK_BYTES else "header"
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        full = check == "full"
        reasons = pool.map(lambda file: _why_unusable(file[0], in_chans, full), files)
        good = []
        for (path, _), reason in zip(files, reasons, strict=True):
            if reason is None:
                good.append(path)
            else:
                skipped.append((path, reason))

    def class_of(path: Path) -> str | None:
        parts = path.relative_to(root).parts
        return parts[0] if len(parts) > 1 else None

    names = [class_of(path) for path in good]
    classes = sorted({name for name in names if name is not None})
    if labelled:
        skipped += [
            (path, "lies outside of the class folders") for path, name in zip(good, names, strict=True) if name is None
        ]
        good = [path for path, name in zip(good, names, strict=True) if name is not None]
        names = [name for name in names if name is not None]
        skipped += [
            (entry, "class folder without a usable image")
            for entry in _subfolders(root)
            if entry.name not in set(classes)
        ]
    skipped.sort()
    if not good:
        wanted = "images in class folders (FOLDER/<class>/<image>)" if labelled else "images"
        first = f"; first of {len(skipped)} skipped: {skipped[0][0]} ({skipped[0][1]})" if skipped else ""
        raise DataError(f"{root}: looked for {wanted} at all depths and found no usable one{first}")
    index = {name: number for number, name in enumerate(classes)}
    labels = [index[name] for name in names if name is not None]
    return ImageListing(root, good, labels if len(labels) == len(good) else None, classes, skipped)


def _subfolders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _walk(
    folder: Path,
    above: tuple[tuple[int, int], ...],
    files: list[tuple[Path, int]],
    skipped: list[tuple[Path, str]],
) -> None:
    """Collect regular files and their sizes; ``above`` identifies the folders on the way down, to end link loops."""
    try:
        status = folder.stat()
        here = status.st_dev, status.st_ino
        if here in above:
            skipped.append((folder, "link to a folder that contains it"))
            return
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        if not above:
            raise DataError(f"{folder}: {error.strerror}; expected a readable folder of images") from error
        skipped.append((folder, error.strerror or str(error)))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        try:
            status = entry.stat()
        except OSError as error:
            skipped.append((path, f"broken link: {error.strerror}" if entry.is_symlink() else str(error.strerror)))
            continue
        if stat.S_ISDIR(status.st_mode):
            _walk(path, (*above, here), files, skipped)
        elif stat.S_ISREG(status.st_mode):
            files.append((path, status.st_size))
        else:
            skipped.append((path, "not a regular file"))


def _why_unusable(path: Path, in_chans: int, full: bool) -> str | None:
    try:
        if full:
            load_image(path, in_chans)
        else:
            check_header(path)
    except UnreadableImageError as error:
        return str(error)
    return None


def stratified_split(labels: Sequence[int], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of a training and a validation part, both sorted; every class is split in the same proportion.

    A class of two or more images has at least one in each part; a single image is for training.

    Raises:
        ValueError: unless ``val_fraction`` lies strictly between 0 and 1.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie strictly between 0 and 1, got {val_fraction}")
    rng = np.random.default_rng(seed)
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    train: list[int] = []
    val: list[int] = []
    for label in sorted(members):
        order = [members[label][i] for i in rng.permutation(len(members[label]))]
        count = min(len(order) - 1, max(1, round(len(order) * val_fraction)))
        val += order[:count]
        train += order[count:]
    return sorted(train), sorted(val)


# Data sets -----------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Decoded images by number."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image | NDArray[np.float32]:
        """An RGB image, or an array ``[H, W, C]`` where C is neither 1 nor 3.

        Raises:
            UnreadableImageError: if it cannot be decoded.
        """


@dataclass(frozen=True)
class FileSource:
    """Images in files."""

    paths: Sequence[Path]
    in_chans: int

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Image.Image | NDArray[np.float32]:
        return load_image(self.paths[index], self.in_chans)


@dataclass(frozen=True)
class DigitsSource:
    """Digits ``[N, 8, 8]`` uint8, enlarged (bicubic), gray in every channel."""

    digits: NDArray[np.uint8]
    img_size: tuple[int, int]
    in_chans: int

    def __len__(self) -> int:
        return len(self.digits)

    def load(self, index: int) -> Image.Image | NDArray[np.float32]:
        image = Image.fromarray(self.digits[index]).resize(self.img_size[::-1], Image.Resampling.BICUBIC)
        if self.in_chans in (1, 3):
            return image.convert("RGB")
        gray = np.asarray(image, dtype=np.float32)[..., None] / np.float32(255)
        return np.repeat(gray, self.in_chans, axis=-1)


class ImageDataset(Dataset[Any]):
    """Images as normalised tensors ``[C, H, W]``, or pairs (image, label). Picklable, for workers.

    A random transform is seeded by (seed, epoch, index): call :meth:`set_epoch` before each epoch, also where the
    workers persist; the epoch lies in shared memory.

    Args:
        source: the decoded images.
        transform: from a decoded image to a tensor.
        plain_transform: the same without randomness, for pictures.
        labels: one a sample, or None.
        classes: names of the labels.
        mean, std: the normalisation inside ``transform``.
        seed: of the random transforms.
        skipped: files left out at the scan, and why.
        description: one line on what this is.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        plain_transform: Transform,
        *,
        labels: Sequence[int] | None = None,
        classes: Sequence[str] = (),
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        skipped: Sequence[tuple[Path, str]] = (),
        description: str = "",
    ) -> None:
        self.source = source
        self.transform = transform
        self.plain_transform = plain_transform
        self.labels = None if labels is None else list(labels)
        self.classes = list(classes)
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.seed = seed
        self.skipped = list(skipped)
        self.description = description
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._damaged = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which decides how samples are augmented."""
        self._epoch.fill_(epoch)

    @property
    def replaced(self) -> list[int]:
        """Numbers of the samples that could not be decoded so far, in any worker, and were replaced."""
        return self._damaged.nonzero().flatten().tolist()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        """Sample ``index``, or the next readable one.

        Raises:
            DataError: if no sample is readable.
        """
        index = range(len(self))[index]
        found, decoded = self._load(index)
        with sample_seed(self.seed, int(self._epoch), index):
            image = self.transform(decoded)
        return image if self.labels is None else (image, self.labels[found])

    def _load(self, index: int) -> tuple[int, Any]:
        reason: Exception | None = None
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return candidate, self.source.load(candidate)
            except UnreadableImageError as error:
                self._damaged[candidate] = True
                reason = error
        raise DataError(f"none of the {len(self)} images can be read any more: {reason}") from reason

    def examples(self, count: int) -> Tensor:
        """``[n, C, H, W]``: up to ``count`` images spread evenly over the data set, without augmentation."""
        count = min(count, len(self))
        chosen = np.linspace(0, len(self) - 1, count).round().astype(int)
        return torch.stack([self.plain_transform(self._load(int(index))[1]) for index in chosen])


class PredictDataset(Dataset[Any]):
    """Yields (image, index, reason): reason is empty, or says why the file cannot be read; the image is then zero.

    Args:
        files: the images, in the order of their names.
        transform: evaluation transform.
        shape: (C, H, W) of its output.
        skipped: what the search left out, and why.
    """

    def __init__(
        self,
        files: Sequence[Path],
        transform: Transform,
        shape: tuple[int, int, int],
        skipped: Sequence[tuple[Path, str]] = (),
    ) -> None:
        self.files = list(files)
        self.transform = transform
        self.shape = shape
        self.skipped = list(skipped)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        try:
            return self.transform(load_image(self.files[index], self.shape[0])), index, ""
        except UnreadableImageError as error:
            return torch.zeros(self.shape), index, str(error)


# What the scripts call -----------------------------------------------------------------------------------------------


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
        mean, std: normalisation; by default :func:`~convnextv2.transforms.default_statistics`, computed from the images
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


def export_digits(folder: str | Path, part: str = "val", *, val_fraction: float = 0.2, seed: int = 0) -> list[Path]:
    """Write digits as 8×8 gray PNG files ``<folder>/<digit>/<number>.png``.

    Args:
        folder: made if it does not exist.
        part: ``val`` or ``train`` of the split for ``seed`` and ``val_fraction``, or ``all``.

    Returns:
        The files, sorted.

    Raises:
        OSError: if they cannot be written.
    """
    digits, labels = _digits()
    train, val = stratified_split(labels, val_fraction, seed)
    parts = {"train": train, "val": val, "all": list(range(len(labels)))}
    if part not in parts:
        raise ValueError(f"part must be one of {', '.join(parts)}, got {part!r}")
    files = []
    for index in parts[part]:
        path = Path(folder) / str(labels[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits[index]).save(path)
        files.append(path)
    return sorted(files)


def _digits() -> tuple[NDArray[np.uint8], list[int]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), [int(label) for label in bunch.target]


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

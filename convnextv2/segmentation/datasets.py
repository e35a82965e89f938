"""Data sets of pairs of images and masks: for training, for evaluation; and images to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from convnextv2.data.datasets import ImageDataset
from convnextv2.data.decoding import UnreadableImageError, Wanted
from convnextv2.data.reading import looks_native, prepared_by, with_statistics
from convnextv2.data.sources import FileSource, OpenedSource, Part
from convnextv2.data.transforms import Statistics
from convnextv2.segmentation.masks import Classes
from convnextv2.segmentation.pairs import IMAGES, PairSource, find_classes, find_parts, load_whole, open_pairs
from convnextv2.segmentation.transforms import CentreTransform, PairAugmentation, TrainTransform, WholeTransform, pixels

Numbers = Sequence[float] | None


class WholePairs(ImageDataset):
    """Samples are pixels ``[H, W, C]`` and classes ``[H, W]`` of whole images; a batch is a list of them."""

    collate: ClassVar[Any] = staticmethod(list)


def build_segmentation_datasets(
    data: str | Path,
    img_size: tuple[int, int],
    in_chans: int = 3,
    *,
    names: str = "",
    ignored: int | None = 255,
    val_fraction: float = 0.2,
    seed: int = 0,
    augmentation: PairAugmentation | None = None,
    mean: Numbers = None,
    std: Numbers = None,
    wanted: Wanted = Wanted(),  # noqa: B008  # frozen
) -> tuple[ImageDataset, ImageDataset, Classes]:
    """Training and validation pairs of a folder, and its classes.

    Args:
        data: holds ``images`` and ``masks``, which are split at random, or ``train`` and ``val`` that do.
        img_size: (H, W) in pixels of crops.
        in_chans, mean, std, wanted: as :func:`~convnextv2.data.build.build_pretrain_dataset`.
        names, ignored: see :func:`~.pairs.find_classes`.
        val_fraction, seed: of the split, and of the augmentation.

    Raises:
        DataError: naming the file, if there is no usable pair, an image or a mask is alone, their sizes differ, or a
            mask holds a value of no class.
        ValueError: if classes are named wrongly, or native images are to be jittered in colour.
    """
    root = Path(data)
    wanted = with_statistics(wanted, mean)
    images = root / "train" / IMAGES if (root / "train").is_dir() else root / IMAGES
    wanted = replace(wanted, pixels="native" if looks_native(images, wanted) else "photo")
    if wanted.native and augmentation is not None and augmentation.color_jitter:
        raise ValueError(
            "`color_jitter` is for photographs of 8 bits; these images are of other values, so set it to 0"
        )
    parts = find_parts(root, in_chans, wanted, val_fraction, seed)
    classes = find_classes(root, names, ignored, parts[0], wanted)
    (train, train_files), (val, val_files) = (open_pairs(files, in_chans, classes, wanted) for files in parts)
    alone = Part(FileSource(train.paths, in_chans, wanted))
    statistics, bad, _ = prepared_by(data, OpenedSource(str(root), alone), alone, in_chans, mean, std)
    augmenting: Any = TrainTransform(img_size, statistics, augmentation or PairAugmentation())
    whole: Any = WholeTransform(in_chans)
    centre = CentreTransform(img_size, statistics)
    about: dict[str, Any] = {"seed": seed, "classes": list(classes.names)}
    training = ImageDataset(
        _part(train, train_files.skipped),
        augmenting,
        centre,
        statistics,
        what=f"{root}, training part",
        bad=bad,
        **about,
    )
    validation = WholePairs(
        _part(val, val_files.skipped), whole, centre, statistics, what=f"{root}, validation part", **about
    )
    return training, validation, classes


def _part(source: PairSource, skipped: Any) -> Part:
    return Part(source, skipped=skipped)


@dataclass(eq=False)
class WholeImages(Dataset[Any]):
    """Pixels ``[H, W, C]`` of image files, with their numbers, or the reasons why they cannot be read; a batch is a
    list."""

    paths: Sequence[Path]
    in_chans: int
    wanted: Wanted

    collate: ClassVar[Any] = staticmethod(list)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor, str]:
        try:
            return index, pixels(load_whole(self.paths[index], self.in_chans, self.wanted), self.in_chans), ""
        except UnreadableImageError as error:
            return index, torch.zeros(0, 0, self.in_chans, dtype=torch.uint8), str(error)


@dataclass(eq=False)
class EvaluatedPairs(Dataset[Any]):
    """As :class:`WholeImages`, with the classes ``[H, W]`` of the pixels."""

    source: PairSource

    collate: ClassVar[Any] = staticmethod(list)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor, str]:
        try:
            return index, *WholeTransform(self.source.in_chans)(self.source.load(index)), ""
        except UnreadableImageError as error:
            nothing = torch.zeros(0, 0, dtype=torch.uint8)
            return index, nothing[..., None].expand(0, 0, self.source.in_chans), nothing, str(error)


def statistics_of(dataset: ImageDataset) -> Statistics:
    """Mean and standard deviation of the images' channels."""
    return tuple(dataset.mean), tuple(dataset.std)

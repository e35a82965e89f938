"""All images of what the user names, each once and without augmentation, with labels where folders say them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from convnextv2.data.build import Numbers, build_predict_dataset
from convnextv2.data.datasets import PredictDataset
from convnextv2.data.decoding import USUAL, Wanted, is_zarr
from convnextv2.data.folders import FolderKind
from convnextv2.data.names import name_of, shown
from convnextv2.data.opening import open_source, source_kinds
from convnextv2.data.reading import plain_transform, wanted_of
from convnextv2.data.sources import DataError, Source
from convnextv2.data.windows import SceneKind

PARTS = ("train", "val", "test")
"""Folders above the class folders, where there are the first two."""


class WholeDataset(PredictDataset):
    """Images, what they are called, and their labels.

    ``names`` are relative to the folder that was named; ``labels`` are indices into ``classes``, -1 for an image that
    lies in no class folder. ``data`` is what was named; ``source`` is None where the images are files, else what they
    come from.
    """

    data: str
    names: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str]
    source: Source | None = None

    def load(self, index: int) -> object:
        return super().load(index) if self.source is None else self.source.load(index)


def build_whole_dataset(
    data: str | Path, img_size: tuple[int, int], in_chans: int, mean: Numbers, std: Numbers, wanted: Wanted = USUAL
) -> WholeDataset:
    """Every image of a folder at all depths, a single file, or the images of another source, such as ``digits``.

    The first folder below ``data`` is an image's class; where ``data`` has ``train`` and ``val``, the first below one
    of :data:`PARTS`. Files are looked for, left out and found to be unreadable as
    :func:`~convnextv2.data.build.build_predict_dataset` says.

    Args:
        img_size: (H, W) in pixels.
        in_chans, mean, std, wanted: as of that function.

    Raises:
        DataError: if there is nothing of that name, or no image.
    """
    if not str(data):
        raise DataError("no images are named; expected a folder, an image, or another source")
    kind = next((kind for kind in source_kinds() if kind.claims(str(data))), None)
    if kind is None or isinstance(kind, FolderKind | SceneKind):
        found = build_predict_dataset([data], img_size, in_chans, mean, std, wanted)
        dataset = WholeDataset(found.files, found.transform, found.shape, found.skipped, found.wanted)
        dataset.data, dataset.source = shown(str(data)), getattr(found, "windows", None)
        dataset.names, dataset.labels, dataset.classes = _by_folder(Path(data), found.files)
        return dataset
    opened = open_source(data, in_chans=in_chans, img_size=img_size, wanted=wanted)
    source, labels = opened.train.by_number, opened.train.labels
    read = wanted_of(opened.train.images)
    names = [name_of(source, number) for number in range(len(source))]
    dataset = WholeDataset(
        [Path(name) for name in names],
        plain_transform(read, img_size, mean, std),
        (in_chans, *img_size),
        opened.train.skipped,
        read,
    )
    dataset.data, dataset.source, dataset.names = shown(str(data)), source, names
    dataset.labels, dataset.classes = ([-1] * len(names), ()) if labels is None else (labels, opened.classes)
    return dataset


def _by_folder(root: Path, files: Sequence[Path]) -> tuple[list[str], list[int], list[str]]:
    """Names, labels and classes of files below a folder; of a single file its name alone."""
    if not root.is_dir() or is_zarr(root):
        return [shown(file.name) for file in files], [-1] * len(files), []
    inside = [file.relative_to(root).parts for file in files]
    parted = (root / "train").is_dir() and (root / "val").is_dir()
    folders = [parts[1:-1] if parted and parts[0] in PARTS else parts[:-1] for parts in inside]
    classes = sorted({parts[0] for parts in folders if parts})
    number = {name: index for index, name in enumerate(classes)}
    labels = [number[parts[0]] if parts else -1 for parts in folders]
    return [shown(os.path.join(*parts)) for parts in inside], labels, [*map(shown, classes)]  # noqa: PTH118  # a text

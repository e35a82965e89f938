"""Folders of images, labelled or not.

A folder is read by content, not by file names' endings, and bad files never stop a run. Small folders (up to
:data:`FULL_CHECK_BYTES`) are decoded once when they are scanned; of larger ones only the headers are read. A file that
turns out to be damaged later is replaced by its next readable neighbour in the listing, the same in every run, and
counted in :attr:`~.datasets.ImageDataset.replaced`, which a run tells its user after every epoch.
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

from convnextv2.data.decoding import USUAL, Size, Wanted
from convnextv2.data.images import why_unusable
from convnextv2.data.listings import check_files, list_folder
from convnextv2.data.names import shown
from convnextv2.data.native import settled
from convnextv2.data.paths import PathList
from convnextv2.data.reading import wanted_of
from convnextv2.data.sources import DataError, FileSource, OpenedSource, Part

FULL_CHECK_BYTES = 256 * 2**20
"""Folders up to this size are decoded whole when scanned, some seconds' work; larger ones are checked by header."""


def scan_images(
    folder: str | Path, *, in_chans: int = 3, labelled: bool = False, check: str = "auto", wanted: Wanted = USUAL
) -> OpenedSource:
    """The usable images below a folder, sorted; no labels if one lies outside of a class folder.

    Hidden files and folders (a leading dot) are passed over in silence. Links are followed; no folder is read twice.

    Args:
        folder: searched at all depths; the subfolders in it that hold a usable image are the classes, sorted.
        in_chans: channels that the images must provide.
        labelled: insist on classes: images directly in ``folder`` are skipped, and so are class folders without a
            usable image (both with a reason).
        check: ``full`` decodes every image, ``header`` reads what comes before the pixels, ``auto`` chooses by
            :data:`FULL_CHECK_BYTES`.
        wanted: what else is wanted of the files.

    Raises DataError if the folder does not exist, cannot be read, or holds no usable image.
    """
    root = Path(folder)
    if check not in ("auto", "full", "header"):
        raise ValueError(f"check must be auto, full or header, got {check!r}")
    listing = list_folder(root)
    paths, skipped = listing.paths, listing.told()
    wanted = settled(wanted, paths)
    full = check == "full" or (check == "auto" and listing.size <= FULL_CHECK_BYTES)
    checked = in_chans, full, wanted, threading.Lock()
    reasons = check_files(listing, f"{in_chans} {full} {wanted}", lambda path: why_unusable(path, *checked))
    skipped += [(paths[number], reason) for number, reason in reasons.items()]
    names = paths.names()
    good = [name for number, name in enumerate(names) if number not in reasons] if reasons else names
    inside = [name for name in good if os.sep in name]
    folder_of = [name.partition(os.sep)[0] for name in inside]
    classes = sorted({*folder_of})
    if labelled:
        skipped += [(root / name, "lies outside of the class folders") for name in good if os.sep not in name]
        good = inside
        folders = (entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        skipped += [(entry, "class folder without a usable image") for entry in folders if entry.name not in classes]
    skipped.sort()
    if not good:
        sought = "images in class folders (FOLDER/<class>/<image>)" if labelled else "images"
        first = f"; first of {len(skipped)} skipped: {skipped[0][0]} ({skipped[0][1]})" if skipped else ""
        raise DataError(f"{root}: looked for {sought} at all depths and found no usable one{first}")
    index = {name: number for number, name in enumerate(classes)}
    labels = [index[name] for name in folder_of] if len(good) == len(inside) else None
    kept = paths if len(good) == len(names) else PathList(root, good, listed=paths.listed)
    images = Part(FileSource(kept, in_chans, wanted), labels, skipped)
    return OpenedSource(str(root), images, classes=[*map(shown, classes)])


class FolderKind:
    """A folder: of images, of class folders, or of ``train`` and ``val`` with class folders."""

    expects = "a folder of images"

    def claims(self, spec: str) -> bool:
        return Path(spec).is_dir()

    def open(self, spec: str, *, in_chans: int, img_size: Size, labelled: bool, wanted: Wanted) -> OpenedSource:
        whole = Path(spec)
        parted = (whole / "train").is_dir() and (whole / "val").is_dir()
        scan = partial(scan_images, in_chans=in_chans, labelled=labelled, wanted=wanted)
        opened = scan(whole / "train" if parted else whole)
        if not (labelled and parted):
            return opened
        other = scan(whole / "val", wanted=wanted_of(opened.train.images))
        if unknown := sorted(set(other.classes) - set(opened.classes)):
            what = f"classes that {opened.description} does not: {', '.join(unknown)}"
            raise DataError(f"{other.description}: holds {what}")
        labels = [opened.classes.index(other.classes[label]) for label in other.train.labels or []]
        return replace(opened, description=str(whole), val=replace(other.train, labels=labels))


SOURCE_KIND = FolderKind()

"""Folders of images, labelled or not.

A folder is read by content, not by file names' endings, and bad files never stop a run. Small folders (up to
:data:`FULL_CHECK_BYTES`) are decoded once when they are scanned; of larger ones only the headers are read. A file that
turns out to be damaged later is replaced by its next readable neighbour in the listing, the same in every run, and
counted in :attr:`~.datasets.ImageDataset.replaced`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from convnextv2.data.images import why_unusable
from convnextv2.data.sources import DataError, FileSource, OpenedSource, Part

FULL_CHECK_BYTES = 256 * 2**20
"""Folders up to this size are decoded whole when scanned, some seconds' work; larger ones are checked by header."""


def scan_images(folder: str | Path, *, in_chans: int = 3, labelled: bool = False, check: str = "auto") -> OpenedSource:
    """The usable images below a folder, sorted; no labels if one lies outside of a class folder.

    Hidden files and folders (a leading dot) are passed over in silence. Links are followed; loops are not.

    Args:
        folder: searched at all depths; the subfolders in it that hold a usable image are the classes, sorted.
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
    skipped: list[tuple[Path, str]] = []
    files = list(walk_files(root, skipped))
    full = check == "full" or (check == "auto" and sum(size for _, size in files) <= FULL_CHECK_BYTES)
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        reasons = list(pool.map(lambda file: why_unusable(file[0], in_chans, full), files))
    skipped += [(path, reason) for (path, _), reason in zip(files, reasons, strict=True) if reason is not None]
    good = [path for (path, _), reason in zip(files, reasons, strict=True) if reason is None]
    inside = [path for path in good if path.parent != root]
    classes = sorted({path.relative_to(root).parts[0] for path in inside})
    if labelled:
        skipped += [(path, "lies outside of the class folders") for path in good if path.parent == root]
        good = inside
        folders = (entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        skipped += [(entry, "class folder without a usable image") for entry in folders if entry.name not in classes]
    skipped.sort()
    if not good:
        wanted = "images in class folders (FOLDER/<class>/<image>)" if labelled else "images"
        first = f"; first of {len(skipped)} skipped: {skipped[0][0]} ({skipped[0][1]})" if skipped else ""
        raise DataError(f"{root}: looked for {wanted} at all depths and found no usable one{first}")
    index = {name: number for number, name in enumerate(classes)}
    labels = [index[path.relative_to(root).parts[0]] for path in inside] if good == inside else None
    return OpenedSource(str(root), Part(FileSource(good, in_chans), labels, skipped), classes=classes)


def walk_files(folder: Path, skipped: list[tuple[Path, str]], above: tuple = ()) -> Iterator[tuple[Path, int]]:
    """The regular files at all depths, sorted, and their sizes in bytes; what is none is added to ``skipped``.

    ``above`` identifies the folders on the way down, to end link loops.

    Raises:
        DataError: if ``folder`` itself cannot be read.
    """
    try:
        status = folder.stat()
        here = status.st_dev, status.st_ino
        if here in above:
            skipped.append((folder, "link to a folder that contains it"))
            return
        seen = (entry for entry in os.scandir(folder) if not entry.name.startswith("."))
        entries = sorted(seen, key=lambda entry: entry.name)
    except OSError as error:
        if not above:
            raise DataError(f"{folder}: {error.strerror}; expected a readable folder of images") from error
        skipped.append((folder, error.strerror or str(error)))
        return
    for entry in entries:
        path = Path(entry.path)
        try:
            status = entry.stat()
        except OSError as error:
            skipped.append((path, f"broken link: {error.strerror}" if entry.is_symlink() else str(error.strerror)))
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from walk_files(path, skipped, (*above, here))
        elif stat.S_ISREG(status.st_mode):
            yield path, status.st_size
        else:
            skipped.append((path, "not a regular file"))


class FolderKind:
    """A folder: of images, of class folders, or of ``train`` and ``val`` with class folders."""

    expects = "a folder of images"

    def claims(self, spec: str) -> bool:
        return Path(spec).is_dir()

    def open(self, spec: str, *, in_chans: int, img_size: tuple[int, int], labelled: bool) -> OpenedSource:
        whole = Path(spec)
        parted = (whole / "train").is_dir() and (whole / "val").is_dir()
        opened = scan_images(whole / "train" if parted else whole, in_chans=in_chans, labelled=labelled)
        if not (labelled and parted):
            return opened
        other = scan_images(whole / "val", in_chans=in_chans, labelled=True)
        if unknown := sorted(set(other.classes) - set(opened.classes)):
            what = f"classes that {opened.description} does not: {', '.join(unknown)}"
            raise DataError(f"{other.description}: holds {what}")
        labels = [opened.classes.index(other.classes[label]) for label in other.train.labels or []]
        return replace(opened, description=str(whole), val=replace(other.train, labels=labels))


SOURCE_KIND = FolderKind()

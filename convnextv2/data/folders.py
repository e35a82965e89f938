"""Folders of images, labelled or not.

A folder is read by content, not by file names' endings, and bad files never stop a run. Small folders (up to
:data:`FULL_CHECK_BYTES`) are decoded once when they are scanned; of larger ones only the headers are read. A file that
turns out to be damaged later is replaced by its next readable neighbour in the listing, the same in every run, and
counted in :attr:`~.datasets.ImageDataset.replaced`, which a run tells its user after every epoch.
"""

from __future__ import annotations

import os
import stat
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from convnextv2.data.decoding import USUAL, Size, Wanted
from convnextv2.data.images import why_unusable
from convnextv2.data.names import shown
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
    if not root.is_dir():
        raise DataError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}; expected a folder of images")
    skipped: list[tuple[Path, str]] = []
    files = walk_files(root, skipped)
    full = check == "full" or (check == "auto" and sum(size for _, size in files) <= FULL_CHECK_BYTES)
    checked = in_chans, full, wanted, threading.Lock()
    with ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        reasons = list(pool.map(lambda file: why_unusable(file[0], *checked), files))
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
        sought = "images in class folders (FOLDER/<class>/<image>)" if labelled else "images"
        first = f"; first of {len(skipped)} skipped: {skipped[0][0]} ({skipped[0][1]})" if skipped else ""
        raise DataError(f"{root}: looked for {sought} at all depths and found no usable one{first}")
    index = {name: number for number, name in enumerate(classes)}
    labels = [index[path.relative_to(root).parts[0]] for path in inside] if good == inside else None
    images = Part(FileSource(good, in_chans, wanted), labels, skipped)
    return OpenedSource(str(root), images, classes=[*map(shown, classes)])


def walk_files(root: Path, skipped: list[tuple[Path, str]]) -> list[tuple[Path, int]]:
    """The regular files at all depths, sorted, and their sizes in bytes; what is left out is added to ``skipped``.

    Every folder is read once: by its own name where it has one below ``root``, else by the first link to it. Raises
    DataError if ``root`` itself cannot be read.
    """
    files, waiting, links, seen = list[tuple[Path, int]](), [root], deque[Path](), dict[tuple[int, int], Path]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.popleft()
        try:
            status = folder.stat()
            first = seen.setdefault((status.st_dev, status.st_ino), folder)
            if first is not folder:
                loop = first in folder.parents
                skipped.append((folder, "link to a folder that contains it" if loop else f"the same folder as {first}"))
                continue
            entries = sorted((one for one in os.scandir(folder) if one.name[0] != "."), key=lambda one: one.name)
        except OSError as error:
            if folder is root:
                raise DataError(f"{root}: {error.strerror}; expected a readable folder of images") from error
            skipped.append((folder, error.strerror or str(error)))
            continue
        inside = list[Path]()
        for entry in entries:
            path = Path(entry.path)
            try:
                status = entry.stat()
            except OSError as error:
                skipped.append((path, f"broken link: {error.strerror}" if entry.is_symlink() else str(error.strerror)))
                continue
            if stat.S_ISDIR(status.st_mode):
                (links if entry.is_symlink() else inside).append(path)
            elif stat.S_ISREG(status.st_mode):
                files.append((path, status.st_size))
            else:
                skipped.append((path, "not a regular file"))
        waiting += reversed(inside)
    return sorted(files, key=lambda file: file[0].parts)


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
        other = scan(whole / "val")
        if unknown := sorted(set(other.classes) - set(opened.classes)):
            what = f"classes that {opened.description} does not: {', '.join(unknown)}"
            raise DataError(f"{other.description}: holds {what}")
        labels = [opened.classes.index(other.classes[label]) for label in other.train.labels or []]
        return replace(opened, description=str(whole), val=replace(other.train, labels=labels))


SOURCE_KIND = FolderKind()

"""Image files and their labels into tar shards, as WebDataset reads them."""

from __future__ import annotations

import io
import re
import secrets
import shutil
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convnextv2.data.decoding import UnreadableImageError, reasons
from convnextv2.data.dicom import is_dicom
from convnextv2.data.encoded import Stored
from convnextv2.data.encoded_sources import EncodedSource
from convnextv2.data.images import has_image_suffix
from convnextv2.data.names import name_of
from convnextv2.data.opening import open_source
from convnextv2.data.shards import CLASSES, ENDING
from convnextv2.data.sources import DataError, FileSource, OpenedSource, Part, Subset
from convnextv2.data.tar_index import SUFFIX, scan
from convnextv2.data.tiff import is_tiff
from convnextv2.messages import one_line
from convnextv2.outputs import OutputError

ENDINGS = {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2"}
_PLAIN = re.compile(r"[^A-Za-z0-9_-]+")


def write_shards(
    data: str | Path,
    output: str | Path,
    *,
    in_chans: int = 3,
    samples: int = 1000,
    shuffle: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[OpenedSource, list[Path]]:
    """Write image files into shards; what was opened, and the shards.

    Files go in as they are. ``output`` is made: it holds ``000000.tar`` and so on, in ``train`` and ``val`` where the
    data has these, beside each shard its index, and the names of the classes. It appears when all is written.

    Args:
        data: a folder of images, or what else holds image files; as ``spec`` of :func:`~.opening.open_source`.
        output: the folder to write, which is not there yet, or empty.
        in_chans: channels that the images must have; files that cannot be used are left out.
        samples: in a shard, at most.
        shuffle: seed of the order; None for that of the folder.
        progress: wraps the numbers of the samples.

    Raises:
        DataError: if there is no usable image, or the images are no files.
        OutputError: if the output is there.
        OSError: if it cannot be written.
    """
    target = Path(output)
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}")
    if target.is_dir() and not any(target.iterdir()):
        pass
    elif target.exists() or target.is_symlink():
        raise OutputError(f"{target}: exists; name a folder that is not there yet")
    if target.resolve().is_relative_to(Path(data).resolve()):
        raise OutputError(f"{target}: lies in {data}, and its files would be read as data; name another")
    opened = _opened(data, in_chans)
    parts = {"train": opened.train, "val": opened.val} if opened.val is not None else {"": opened.train}
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        written, left = list[Path](), dict[str, list[tuple[Path, str]]]()
        for name, part in parts.items():
            paths, left[name] = _write_part(part, temporary / name, samples, shuffle, progress)
            written += paths
        if not written:
            raise DataError(f"{data}: none of its images can be had; the first {left[name][0][1]}")
        if opened.classes and opened.train.labels is not None:
            (temporary / CLASSES).write_text(
                "".join(f"{one_line(name)}\n" for name in opened.classes), encoding="utf-8"
            )
        if target.is_dir():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    told = [replace(part, skipped=[*part.skipped, *left[name]]) for name, part in parts.items()]
    opened = replace(opened, train=told[0], val=told[1] if len(told) > 1 else None)
    return opened, [target / path.relative_to(temporary) for path in written]


def _opened(data: str | Path, in_chans: int) -> OpenedSource:
    """The data, with the validation part where it has one."""
    folder = all((Path(data) / part).is_dir() for part in ("train", "val"))
    opened = open_source(data, in_chans=in_chans, labelled=folder)
    images = opened.train.by_number
    if not folder and opened.train.labels is not None and not (Path(data).is_dir() and isinstance(images, FileSource)):
        opened = open_source(data, in_chans=in_chans, labelled=True)
    while isinstance(images, Subset):
        images = images.source
    if not isinstance(images, FileSource | EncodedSource):
        raise DataError(f"{data}: shards are made of image files; these images are none")
    return opened


def _file(images: Any, number: int) -> Stored:
    while isinstance(images, Subset):
        number, images = images.numbers[number], images.source
    return images.paths[number] if isinstance(images, FileSource) else images.encoded(number)


def _ending(file: Stored) -> str:
    """The ending of the file's name, or one that suits what is in it: samples are known by it."""
    named = Path(file.name)
    if has_image_suffix(named):
        return named.suffix.lower()
    with reasons(), file.open("rb") as opened:
        start = opened.read(132)
        if is_dicom(start) or is_tiff(start):
            return ".dcm" if is_dicom(start) else ".tif"
        opened.seek(0)
        with Image.open(opened) as image:
            kind = str(image.format)
            return ENDINGS.get(kind, f".{kind.lower()}")


def _write_part(
    part: Part, folder: Path, samples: int, shuffle: int | None, progress: Callable[[Iterable[Any]], Iterable[Any]]
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The shards, and the images that could not be had."""
    images = part.by_number
    order = np.arange(len(images)) if shuffle is None else np.random.default_rng(shuffle).permutation(len(images))
    folder.mkdir(parents=True, exist_ok=True)
    written, left, tar, number = list[Path](), list[tuple[Path, str]](), None, 0
    try:
        for place in progress(order.tolist()):
            try:
                file = _file(images, place)
                ending, content = _ending(file), file.read_bytes()
            except UnreadableImageError as error:
                left.append((Path(name_of(images, place)), str(error)))
                continue
            if number % samples == 0:
                if tar is not None:
                    tar.close()
                written.append(folder / f"{len(written):06d}{ENDING}")
                tar = tarfile.open(written[-1], "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  # closed in turn
            assert tar is not None
            key = f"{number:08d}-{_PLAIN.sub('-', Path(file.name).stem)[:60]}"
            _add(tar, f"{key}{ending}", content)
            if part.labels is not None:
                _add(tar, f"{key}.cls", str(part.labels[place]).encode())
            number += 1
    finally:
        if tar is not None:
            tar.close()
    for path in written:
        with path.open("rb") as shard:
            scan(shard, path.stat().st_size).write(path.with_name(path.name + SUFFIX))
    return written, left


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A member without owner and time: the same images are the same shards."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    tar.addfile(member, io.BytesIO(content))

"""Exports as results: where they may go, and written, checked and only then there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from convnextv2.export.folders import check_folder, output_folder
from convnextv2.export.source import Source, check_written
from convnextv2.export.target import Target
from convnextv2.export.targets import TARGETS
from convnextv2.outputs import Kind, check_output, output_file, output_path


def check_place(target: Target, path: Path, inputs: Iterable[Path] = (), overwrite: bool = False) -> None:
    """Refuse a place that the format must not be written to.

    Args:
        target: the format.
        path: of the file or folder.
        inputs: files and folders that are read.
        overwrite: let it replace a file of another kind or origin; a folder never is.

    Raises:
        OutputError: with the reason.
        OSError: if the place cannot be looked at.
    """
    what = f"what the target {target.name} writes"
    if target.suffixes:
        check_output(path, Kind(what, target.suffixes, target.is_one), inputs=inputs, overwrite=overwrite)
    else:
        check_folder(path, what, target.is_one, inputs)


def export(
    source: Source,
    name: str,
    path: str | os.PathLike[str],
    *,
    check: bool = True,
    seed: int = 0,
    overwrite: bool = False,
) -> str:
    """Write a network in another program's format, if that program computes the same from it.

    Args:
        source: from :func:`~convnextv2.export.source.source_of`.
        name: of the format, one of :data:`TARGETS`.
        path: file or folder to write.
        check: run what was written beside the network, and write nothing if they differ.
        seed: of the random images of the check.
        overwrite: as of :func:`check_place`.

    Returns:
        What the check found, in words; empty without it.

    Raises:
        ValueError: if no format has that name.
        ExportError: if the format cannot hold the network, a package is missing, or the outputs differ.
        OutputError: if it must not go there.
        OSError: if it cannot be written.
    """
    if name not in TARGETS:
        raise ValueError(f"unknown format {name!r}; choose one of {', '.join(TARGETS)}")
    target, output = TARGETS[name], output_path(path)
    target.check_packages()
    check_place(target, output, overwrite=overwrite)
    place: AbstractContextManager[Path] = output_folder(output)
    if target.suffixes:
        place = output_file(output, stream_suffix=target.suffixes[0])
    with place as temporary:
        run = target.write(source, temporary)
        return check_written(source, run, seed) if check else ""

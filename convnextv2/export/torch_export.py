"""A network as a program of ``torch.export``, which runs where torch is, without this package."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from convnextv2.export.source import MARK, Run, Source

ABOUT = f"{MARK}.json"
"""The extra file of an archive that holds what was said about the weights."""


def exported(source: Source) -> ExportedProgram:
    """The network as a program for any batch, and any height and width from two patches on."""
    config = source.network.encoder_config
    images = torch.zeros(2, config.in_chans, 2 * config.patch_size, 3 * config.patch_size)
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        return torch.export.export(source.network, (images,), dynamic_shapes=(free,))


def write(source: Source, path: Path) -> Run:
    """Write the program to ``path``, which ends in ``.pt2``, and read it back."""
    torch.export.save(exported(source), path, extra_files={ABOUT: json.dumps(source.about())})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the file's buffers cannot be written to
        return torch.export.load(path).module()


def is_one(path: Path) -> bool:
    """Whether a file is such a program that was written here."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(f"/extra/{ABOUT}") for name in archive.namelist())


def loading(source: Source, path: str) -> list[str]:
    """How the program is run."""
    side = 2 * source.network.encoder_config.patch_size
    return [
        f"load it with: torch.export.load({path!r}).module(); it takes images of {side}×{side} or more, gives "
        f"{source.gives}, and needs torch alone"
    ]

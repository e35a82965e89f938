"""Fetch a public set of images, check it, and unpack it into a folder of class folders.

The archive is compared with its known SHA-256, and nothing in it can be written outside the folder. What is there
already is left alone; a folder appears whole or not at all. Example:
  fcmae download-data flower_photos
  fcmae pretrain --config small --data flower_photos --output runs/pretrain
"""

from __future__ import annotations

import argparse
import http.client
import socket
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from convnextv2.commands import _cli

TIMEOUT = 60.0
"""Seconds without a byte after which a server is given up."""


class Archive(NamedTuple):
    """A gzipped tar file whose only folder holds the classes."""

    url: str
    sha256: str
    licence: str


ARCHIVES = {
    # As in TensorFlow Datasets' list of checksums, 228,813,984 bytes.
    "flower_photos": Archive(
        "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz",
        "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c",
        "photographs by many people, each under a Creative Commons licence with attribution; see LICENSE.txt in it",
    )
}


def unpack(archive: Path, folder: Path) -> None:
    """The one folder of ``archive`` as ``folder``; ValueError if it holds anything else, or what leads out of it.

    It is unpacked beside the archive first, on the file system of ``folder``.
    """
    if not hasattr(tarfile, "data_filter"):
        raise ValueError("this Python cannot unpack archives safely; take its newest patch release")
    place = archive.with_suffix("")
    place.mkdir()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            tar.extractall(place, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{archive.name}: {error}") from error
    found = list(place.iterdir())
    if len(found) != 1 or not found[0].is_dir() or found[0].is_symlink():
        names = ", ".join(sorted(path.name for path in found)) or "nothing"
        raise ValueError(f"{archive.name}: expected one folder, got {names}")
    found[0].rename(folder)


def describe(folder: Path) -> str:
    """What lies in a folder of class folders."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = sum(1 for name in classes for path in (folder / name).rglob("*") if path.is_file())
    return f"{folder}: {files} files of {len(classes)} classes ({', '.join(classes)})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, fetch, unpack."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ARCHIVES, help="which set")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder to make; default: NAME, here")
    parser.add_argument("--url", help="fetch the same archive from there, file:///... too")
    options = parser.parse_args(arguments)

    import torch

    known = ARCHIVES[options.name]
    folder = (options.output or Path(options.name)).absolute()
    if folder.exists() or folder.is_symlink():
        if folder.is_dir() and any(folder.iterdir()):
            _cli.say(f"there already, nothing fetched: {describe(folder)}")
            return
        parser.error(f"--output {folder}: is there, and is no folder of images; name another, or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    url = options.url or known.url
    _cli.say(f"{options.name}: {known.licence}")
    socket.setdefaulttimeout(TIMEOUT)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        archive = Path(place) / f"{options.name}.tgz"
        try:
            torch.hub.download_url_to_file(url, str(archive), known.sha256)
        except (RuntimeError, http.client.HTTPException, OSError) as error:
            told = "it is not the file that is known, or was cut short" if type(error) is RuntimeError else error
            raise ValueError(f"cannot download {url} ({told}); check the connection, or say --url") from error
        unpack(archive, folder)
    _cli.say(describe(folder))

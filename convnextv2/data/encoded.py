"""Image files that lie in memory: samples of shards, cells of tables, what was fetched from an address."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, eq=False)
class Encoded:
    """The bytes of an image file, with what decoders ask of a path.

    Args:
        content: the file.
        name: what it is called; its ending counts for ``.npy`` and ``.npz``, which are known by it.
    """

    content: bytes
    name: str = ""

    @property
    def suffix(self) -> str:
        """As that of a path."""
        return os.path.splitext(self.name)[1]  # noqa: PTH122  # once a sample

    def open(self, mode: str = "rb") -> io.BytesIO:
        """A file to read."""
        return io.BytesIO(self.content)

    def read_bytes(self) -> bytes:
        """The file."""
        return self.content

    def stat(self) -> os.stat_result:
        """Its size; all else is 0."""
        return os.stat_result((0, 0, 0, 0, 0, 0, len(self.content), 0, 0, 0))


Stored = Path | Encoded
"""An image file, on disk or in memory."""


def openable(file: Stored) -> Path | io.BytesIO:
    """What libraries take that open a path by themselves."""
    return file if isinstance(file, Path) else file.open()

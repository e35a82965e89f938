"""Files behind an address, read in parts through fsspec: ``https://``, ``s3://``, and what else is installed for it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from convnextv2.data.sources import DataError
from convnextv2.data.tar_index import SUFFIX, TarIndex, read_index, scan
from convnextv2.messages import one_line

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.ASCII)
_PASSWORD = re.compile(r"(?<=://)[^/@]*@")
MOST_INDEX = 2**30
"""Bytes of an index that are read."""


def is_address(text: str) -> bool:
    """Whether ``text`` begins as ``scheme://``."""
    return _ADDRESS.match(text) is not None


_systems: dict[tuple[int, str], Any] = {}
"""File systems of this process: they hold threads and connections, which a forked one has not."""


@dataclass(frozen=True)
class RemoteFile:
    """A file behind an address. ``str`` leaves out a user's name and password."""

    address: str

    def __str__(self) -> str:
        return _PASSWORD.sub("", self.address)

    def _system(self) -> tuple[Any, str]:
        import fsspec

        scheme = self.address.partition("://")[0]
        key = os.getpid(), scheme
        try:
            if key not in _systems:
                _systems[key] = fsspec.filesystem(scheme, skip_instance_cache=True)
            return _systems[key], _systems[key]._strip_protocol(self.address)
        except (ImportError, ValueError) as error:
            raise DataError(f"{self}: cannot be read without what fsspec needs for it ({one_line(error)})") from error

    def size(self) -> int:
        """Bytes. Raises OSError if there is no such file, or it cannot be told."""
        system, path = self._system()
        size = system.info(path).get("size")
        if size is None:
            raise OSError("its server does not say how long it is, so no part of it can be asked for")
        return int(size)

    def read(self, start: int, size: int) -> bytes:
        """Bytes from ``start`` on; OSError if they cannot be had."""
        system, path = self._system()
        try:
            found = bytes(system.cat_file(path, start=start, end=start + size))
        except OSError:
            raise
        except Exception as error:  # of the client library, which is another for each scheme
            raise OSError(one_line(error) or type(error).__name__) from error
        return found if len(found) <= size else found[start : start + size]  # of a server that sends whole files

    def open(self) -> Any:
        """A file to read, whose parts are fetched when they are asked for; OSError if there is none."""
        system, path = self._system()
        return system.open(path, "rb")

    def beside(self, name: str) -> str | None:
        """The text of a file in the same folder, or in the one above; None where there is none."""
        folder = self.address.rpartition("/")[0]
        for place in (folder, folder.rpartition("/")[0]):
            other = RemoteFile(f"{place}/{name}")
            try:
                return other.read(0, min(other.size(), MOST_INDEX)).decode("utf-8", "backslashreplace")
            except OSError:
                continue
        return None


def remote_index(shard: RemoteFile) -> TarIndex:
    """The index of a shard: the one beside it, else made by its headers, which takes a request for many members.

    Raises:
        OSError: if the shard cannot be read.
    """
    size = shard.size()
    try:
        beside = RemoteFile(shard.address + SUFFIX)
        found = read_index(beside.read(0, MOST_INDEX).decode("utf-8", "replace"), size)
    except OSError:
        found = None
    if found is not None:
        return found
    system, path = shard._system()
    with system.open(path, "rb", block_size=2**20) as file:
        return scan(file, size)

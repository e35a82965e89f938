"""What cannot be read by number is written once into the user's cache, and read from there from then on.

A file that no start has asked for in :data:`UNUSED_DAYS` days is deleted when the next one is written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from convnextv2.data.cache import alone
from convnextv2.data.sources import DataError
from convnextv2.data.tar_index import cache_folder
from convnextv2.files import atomic_path, is_leftover
from convnextv2.messages import one_line

UNUSED_DAYS = 30
LEAST_FREE = 2**30
"""Bytes of the disk that are left free."""
_logger = logging.getLogger(__name__)


def spooled(what: str, key: str, suffix: str, write: Callable[[Path], None]) -> Path:
    """The file of ``key``, which ``write`` makes where there is none; other processes that want it wait.

    Args:
        what: what the user named, for messages.
        key: everything that the content depends on.
        suffix: of the file's name.
        write: fills the path that it is given; what it raises goes on, and leaves no file.

    Raises:
        DataError: if the cache cannot be written.
    """
    folder = cache_folder("spool")
    place = folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}{suffix}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(place):
            if not place.is_file():
                _clean(folder)
                _logger.warning("%s: is written once into %s, and read from there", one_line(what), place)
                with atomic_path(place) as temporary:
                    write(temporary)
        os.utime(
            place, ns=(time.time_ns(), place.stat().st_mtime_ns)
        )  # the time of change is part of what is known of it
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "the disk is full: free some, or let XDG_CACHE_HOME name another" if full else error.strerror or error
        raise DataError(f"{one_line(what)}: cannot be kept in {folder}: {hint}") from error
    return place


def check_free(folder: Path) -> None:
    """Raise OSError if less than :data:`LEAST_FREE` is left."""
    if shutil.disk_usage(folder).free < LEAST_FREE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _clean(folder: Path) -> None:
    """Delete what has not been asked for in a long time, and what killed processes left."""
    now = time.time()
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            days = 1 if is_leftover(path) else UNUSED_DAYS
            if now - max(status.st_atime, status.st_mtime) > days * 86_400:
                path.unlink()

"""Files from the network that are whole or not there: looked into before they get their name, and again when found."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from convnextv2.files import atomic_path
from convnextv2.weights.checkpoint import load_checkpoint
from convnextv2.weights.guard import CheckpointError

TIMEOUT = 30.0
"""Seconds without a byte after which a server is given up."""
CHUNK = 2**20

_logger = logging.getLogger(__name__)


def cached(url: str, target: Path, progress: bool = True, notice: str = "") -> Path:
    """``target``, a checkpoint, downloaded from ``url`` unless it is there and whole.

    Its sha256 is kept beside it, in ``<name>.sha256``, as ``sha256sum`` writes it, and compared when the file is found
    again. One that is found without (put there by hand) is read as a download is. What is damaged is told, and fetched
    anew. Several processes may do so at once. Proxies are those of the environment, as :mod:`urllib` reads it.

    Args:
        notice: logged as a warning before a download.

    Raises:
        CheckpointError: if it cannot be downloaded, or what comes is not a whole checkpoint; nothing is changed.
        OSError: if the place cannot be read or written.
    """
    if target.is_file():
        reason = _damage(target)
        if reason is None:
            return target
        _logger.warning("%s: %s; fetched anew", target, reason)
    if notice:
        _logger.warning("%s", notice)
    with atomic_path(target) as temporary:
        try:
            _download(url, temporary, progress)
            load_checkpoint(temporary)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if not isinstance(error, urllib.error.URLError) and getattr(error, "filename", None) is not None:
                raise  # of this machine
            reason = _reason(error).removeprefix(f"{temporary}: ")
            raise CheckpointError(
                f"cannot download {url} ({reason}); check the connection, or fetch the file elsewhere and put it at "
                f"{target}"
            ) from error
        digest = sha256(temporary)
        _record(target).unlink(missing_ok=True)  # else it would be another file's for a moment
    _write_record(target, digest)
    return target


def _download(url: str, target: Path, progress: bool) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        size = getattr(response, "length", None)  # None in pieces, where http.client sees the end, or if not told
        with (
            target.open("wb") as file,
            tqdm(total=size, disable=not progress, unit="B", unit_scale=True, unit_divisor=1024) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            if size is not None and file.tell() != size:  # http.client says nothing
                raise ConnectionError(f"it ended after {file.tell():,} of {size:,} bytes")


def _reason(error: Exception) -> str:
    found = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", None) or error
    return " ".join(str(found).split()) or type(error).__name__


def _record(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _write_record(target: Path, digest: str) -> None:
    with atomic_path(_record(target)) as temporary:
        temporary.write_text(f"{digest}  {target.name}\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _damage(target: Path) -> str | None:
    """What is wrong with a file that is there."""
    record = _record(target)
    if record.is_file():
        known = record.read_text(encoding="utf-8", errors="replace").partition(" ")[0]
        return None if known == sha256(target) else f"is not the file whose sha256 is in {record.name}"
    try:
        load_checkpoint(target)
    except CheckpointError as error:
        return str(error).removeprefix(f"{target}: ")
    if os.access(target.parent, os.W_OK):  # a cache that others share may be for reading alone
        _write_record(target, sha256(target))
    return None

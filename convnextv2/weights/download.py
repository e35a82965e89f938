"""Files from the network that are whole or not there: looked into before they get their name, and again when found."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import urllib.error
from pathlib import Path

from convnextv2.files import atomic_path
from convnextv2.weights.addresses import shown
from convnextv2.weights.guard import CheckpointError
from convnextv2.weights.transfer import CHUNK, Partial, transfer
from convnextv2.weights.whole import check_whole

_logger = logging.getLogger(__name__)


def cached(url: str, target: Path, progress: bool = True) -> Path:
    """``target``, a checkpoint, downloaded from ``url`` unless it is there and whole.

    Its sha256 is kept beside it, in ``<name>.sha256``, as ``sha256sum`` writes it, and compared when the file is found
    again. One that is found without (put there by hand) is looked into as a download is. What is damaged is told, and
    fetched anew, and has to be the same file as at first. What came of a download that was cut stays beside it,
    in ``<name>.partial``, where the server lets it be gone on from. Several processes may do so at once: one
    downloads, the others wait. Proxies are those of the environment, as :mod:`urllib` reads it.

    Args:
        url: ``http``, ``https`` or ``file``; user and password in it are sent, and not shown.

    Raises:
        CheckpointError: if it cannot be downloaded, or what comes is not a whole checkpoint, or another one than was
            recorded; nothing is changed.
        OSError: if the place cannot be read or written.
    """
    reason = _damage(target) if target.is_file() else None
    if reason is None and target.is_file():
        return target
    target.resolve().parent.mkdir(parents=True, exist_ok=True)
    with Partial.held(target.resolve()) as partial:
        if target.is_file():
            if (reason := _damage(target)) is None:  # another process has fetched it meanwhile
                return target
            _logger.warning("%s: %s; fetched anew", target, reason)
        _fetch(url, target, partial, progress)
        digest = sha256(partial.path)
        known = _recorded(target)
        if known not in (None, digest):
            partial.remove()
            raise CheckpointError(
                f"{shown(url)} is not the file any more whose sha256 is in {_record(target)}; delete that, if the new "
                "one is what you want"
            )
        if known is None:
            _record(target).unlink(missing_ok=True)  # of no use
        partial.become(target.resolve())
    _write_record(target, digest)
    return target


def _fetch(url: str, target: Path, partial: Partial, progress: bool) -> None:
    """The whole file into ``partial``, looked into; CheckpointError with what to do if that cannot be."""
    came = False
    try:
        if not partial.is_whole(url):
            transfer(url, partial, progress)
        came = True
        check_whole(partial.path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if came:
            partial.remove()
        if isinstance(error, OSError) and not isinstance(error, urllib.error.URLError) and error.filename is not None:
            raise  # of this machine
        kept = ""
        if partial.in_place() and partial.validator(url):
            kept = f"the {partial.size:,} bytes that came are kept for the next try; "
        reason = _reason(error).removeprefix(f"{partial.path}: ")
        raise CheckpointError(
            f"cannot download {shown(url)} ({reason}); {kept}check the connection, or fetch the file elsewhere and put "
            f"it at {target}"
        ) from error


def _reason(error: Exception) -> str:
    found = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", None) or error
    return " ".join(str(found).split()) or type(error).__name__


def _record(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _recorded(target: Path) -> str | None:
    """The sha256 that is kept beside a file; None if there is none."""
    record = _record(target)
    if not record.is_file():
        return None
    found = record.read_text(encoding="utf-8", errors="replace").partition(" ")[0]
    return found if re.fullmatch("[0-9a-f]{64}", found) else None


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
    if _record(target).is_file():
        known = _recorded(target)
        return None if known == sha256(target) else f"is not the file whose sha256 is in {_record(target).name}"
    try:
        check_whole(target)
    except CheckpointError as error:
        return str(error).removeprefix(f"{target}: ")
    if os.access(target.parent, os.W_OK):  # a cache that others share may be for reading alone
        _write_record(target, sha256(target))
    return None

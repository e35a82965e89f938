"""Bytes from a server into a file, going on where an earlier try was cut, as far as the server lets that be known.

A server names the version of a file (``ETag``, or ``Last-Modified``). It is kept beside the bytes that came; the next
request asks for the rest of that version (``Range`` with ``If-Range``), and a server that has another one, or sends no
ranges, sends all of it.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from convnextv2.files import write_json
from convnextv2.weights.addresses import path_of, request_of, scheme_of, short_digest, shown

try:
    import fcntl
except ImportError:  # on Windows, where each process has a file of its own, and starts from nothing
    fcntl = None  # type: ignore[assignment]

TIMEOUT = 30.0
"""Seconds without a byte after which a server is given up."""
PAUSES = (1.0, 2.0, 4.0)
"""Seconds before tries in a row that bring nothing, of a transfer that had brought something."""
CHUNK = 2**20
MOST_BYTES = 64 * 2**30
"""Of a file: the largest network in float32 with an optimizer's state has 11 GB."""
_logger = logging.getLogger(__name__)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class _OtherVersionError(Exception):
    """What is there is not a beginning of what the server has."""


class Partial:
    """A file on its way: the bytes that are there, and beside them, in ``.json``, of which version of the file.

    Attributes:
        path: of the bytes, ``NAME.partial``.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file
        self._about = path.with_name(f"{path.name}.json")

    @classmethod
    @contextlib.contextmanager
    def held(cls, target: Path) -> Iterator[Partial]:
        """What is there of ``target``, for this process and thread alone: others wait until it is let go."""
        path = target.with_name(f"{target.name}.partial{'' if fcntl else os.getpid()}")
        while True:
            with path.open("a+b") as file:
                _lock(file)
                partial = cls(path, file)
                if not partial.in_place():
                    continue  # who had it has finished
                try:
                    yield partial
                finally:
                    if partial.in_place() and partial.validator() is None:
                        partial.remove()
                return

    def in_place(self) -> bool:
        """Whether the file still has its name; only who holds it may take that away."""
        if self._file.closed:
            return False
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return os.fstat(self._file.fileno()).st_size

    def _known(self) -> dict[str, Any]:
        try:
            found = json.loads(self._about.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):  # nothing is known, then
            return {}
        return found if isinstance(found, dict) else {}

    def validator(self, url: str | None = None) -> str | None:
        """The version that the bytes are of, as its server named it; None if nothing could be added to them, or they
        are of another address than ``url``."""
        known = self._known()
        found = known.get("validator")
        right = isinstance(found, str) and found.isascii() and found.isprintable()
        right = right and (url is None or known.get("address") == short_digest(url))
        return found if right and self.size else None

    def announced(self) -> int | None:
        """Bytes of the whole file, if its server told that at first."""
        found = self._known().get("size")
        return found if isinstance(found, int) else None

    def is_whole(self, url: str) -> bool:
        """Whether all bytes came that were announced."""
        return self.validator(url) is not None and self.announced() == self.size

    def restart(self, url: str, validator: str | None, size: int | None) -> None:
        """Empty it, for the bytes of a version."""
        self._file.truncate(0)
        self._about.unlink(missing_ok=True)
        if validator is not None:
            write_json(self._about, {"address": short_digest(url), "validator": validator, "size": size})

    def add(self, chunk: bytes) -> None:
        """Write further bytes."""
        self._file.write(chunk)
        self._file.flush()

    def remove(self) -> None:
        """All of it."""
        self._let_go()
        self._about.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def become(self, target: Path) -> None:
        """Give the file its name."""
        os.fsync(self._file.fileno())
        self._let_go()
        self._about.unlink(missing_ok=True)  # first: with the name gone, another may begin
        self.path.replace(target)

    def _let_go(self) -> None:
        if fcntl is None:  # Windows moves and deletes no file that is open
            self._file.close()


def _lock(file: IO[bytes]) -> None:
    """Wait until the file is this process's, or thread's, alone."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system lets it go when the process ends, however that ends
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # of file systems; two at once would then find the other's bytes damaged
            raise


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a server to another, but to no file of this machine, and from a secure one to no open one."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        allowed = ("https",) if req.type == "https" else ("http", "https")
        if scheme_of(newurl) not in allowed:
            raise ConnectionError(f"it leads from {req.type}:// to {shown(newurl)}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Of http and https alone; proxies are those of the environment at this moment."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def transfer(url: str, partial: Partial, progress: bool) -> None:
    """All of the file at ``url`` into ``partial``; a connection that is cut is taken up again while that brings bytes.

    Raises:
        ValueError: if it is no address.
        OSError, http.client.HTTPException: if all of it did not come; what did may be gone on from, or is gone.
    """
    if scheme_of(url) == "file":
        return _copy(path_of(url), partial)
    begun, changed, pauses = False, False, iter(PAUSES)
    while True:
        before = partial.size
        try:
            return _receive(url, partial, progress)
        except _OtherVersionError as other:
            if changed:
                raise ConnectionError("it sends parts of different files") from other
            partial.restart(url, None, None)
            changed = True
        except (OSError, http.client.HTTPException) as error:
            if partial.validator(url) is None or not _may_pass(error):
                raise
            if partial.size > before:
                begun, pauses = True, iter(PAUSES)
            pause = next(pauses, None)
            if not begun or pause is None:
                raise
            time.sleep(pause)


def _may_pass(error: Exception) -> bool:
    """Whether the same request may come to more a moment later."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    local = isinstance(error, OSError) and not isinstance(error, urllib.error.URLError) and error.filename is not None
    return not local and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _copy(source: Path, partial: Partial) -> None:
    try:
        file = source.open("rb")
    except OSError as error:
        raise ConnectionError(f"{source}: {error.strerror}") from error
    with file:
        partial.restart(str(source), None, None)
        while chunk := file.read(CHUNK):
            partial.add(chunk)


def _receive(url: str, partial: Partial, progress: bool) -> None:
    request, validator = request_of(url), partial.validator(url)
    offset = partial.size if validator else 0
    if validator:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", validator)
    try:
        response = _opener().open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if validator and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            error.close()
            raise _OtherVersionError from error
        raise
    with response:
        coding = response.headers.get("Content-Encoding", "identity")
        if coding != "identity":
            raise ConnectionError(f"it comes compressed ({coding[:20]}), which was not asked for")
        length = response.length  # None in pieces, where http.client sees the end, or if not told
        if response.status == http.client.PARTIAL_CONTENT:
            total = _whole_size(response.headers, offset, length)
            other = _version(response.headers) not in (None, validator) or partial.announced() not in (None, total)
            if validator is None or total is None or other:
                raise _OtherVersionError
        else:
            offset, total = 0, length
            partial.restart(url, _version(response.headers), total)
        _check_room(partial.path, offset, total)
        bar = tqdm(
            total=total,
            initial=offset,
            disable=None if progress else True,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
        )
        if progress and bar.disable:  # no terminal
            size = "" if total is None else f", {total / 2**20:,.0f} MiB"
            _logger.warning("downloading %s%s", shown(url), size)
        with bar:
            while chunk := response.read1(CHUNK):  # as it comes: what is here is kept
                partial.add(chunk)
                bar.update(len(chunk))
                if partial.size > (MOST_BYTES if total is None else total):
                    partial.restart(url, None, None)
                    raise ConnectionError("it sends more than it announced, or without an end")
    if total is not None and partial.size != total:  # http.client says nothing
        raise ConnectionError(f"it ended after {partial.size:,} of {total:,} bytes")


def _version(headers: Message) -> str | None:
    """What names a version of a file to the byte, if anything does."""
    tag = headers.get("ETag", "").strip()
    if re.fullmatch(r'"[\x21\x23-\x7e]*"', tag):
        return tag
    return headers.get("Last-Modified")


def _whole_size(headers: Message, offset: int, length: int | None) -> int | None:
    """Bytes of the whole file, by an answer that goes on from ``offset``; None if it does not."""
    found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", headers.get("Content-Range", "").strip())
    if found is None:
        return None
    start, end, total = map(int, found.groups())
    right = start == offset and start <= end < total and length in (None, end + 1 - start)
    return total if right else None


def _check_room(path: Path, offset: int, total: int | None) -> None:
    if total is None:
        return
    if total > MOST_BYTES:
        raise ConnectionError(f"it announces {total:,} bytes, more than any checkpoint has")
    if total - offset > (free := shutil.disk_usage(path.parent).free):
        raise OSError(errno.ENOSPC, f"it has {total:,} bytes, and there is room for {offset + free:,}")

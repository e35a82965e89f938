"""Addresses of files: what of them is shown, and what goes to the server by another way."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request, url2pathname

SCHEMES = ("http", "https", "file")
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/", re.I)


def scheme_of(text: str) -> str:
    """The scheme of an address, in lower case; empty for what is none, such as a path."""
    found = _ADDRESS.match(text)
    return found[1].lower() if found else ""


def shown(address: object) -> str:
    """An address for messages and results, without user, password and what follows ``?``, which may be a key; a path
    as it is."""
    text = str(address)
    if not scheme_of(text):
        return text
    text, question, _ = text.partition("#")[0].partition("?")
    return re.sub(r"^([^:/]+:/+)[^/]*@", r"\1", text) + ("?…" if question else "")


def request_of(address: str) -> Request:
    """A request for an address: user and password, where there are any, go into a header, which no redirect repeats.

    Raises:
        ValueError: if it is no address of a server, naming what is expected.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"unknown kind of address {shown(address)!r}: expected http://, https:// or file://")
    user, at, host = parts.netloc.rpartition("@")
    plain = urlunsplit((parts.scheme, host, quote(parts.path, safe="/%:@!$&'()*+,;=~"), parts.query, ""))
    request = Request(plain, headers={"User-Agent": "sparse-fcmae", "Accept-Encoding": "identity"})
    if at:
        key = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {key}")
    return request


def path_of(address: str) -> Path:
    """The file of a ``file://`` address.

    Raises:
        ValueError: if it is another computer's.
    """
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"is a file of {parts.netloc}; write file:///path for one of this computer")
    return Path(url2pathname(parts.path))


def file_name(address: str) -> str:
    """A name for what lies at an address: that of its path, of plain letters, none that leads elsewhere."""
    name = unquote(urlsplit(address).path).replace("\\", "/").rsplit("/", 1)[-1]
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII).lstrip(".")[-100:] or "checkpoint"


def short_digest(address: str) -> str:
    """Tells addresses apart, whoever asks."""
    parts = urlsplit(address)
    plain = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, parts.query, ""))
    return hashlib.sha256(plain.encode()).hexdigest()[:16]

"""Where results may be written: never over an input, and never over anything but an earlier result of the same kind.

A result is a new regular file, or takes the place of one; a link leads to its target. A pipe, a terminal or another
character device, and a descriptor of this process (``/dev/stdout``, ``-``), is a stream, which is written to and stays
what it is.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from convnextv2.files import atomic_path

STDOUT = Path("/dev/stdout")
_DESCRIPTORS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_IRREGULAR = {stat.S_IFBLK: "a block device", stat.S_IFSOCK: "a socket"}


class OutputError(ValueError):
    """The result must not go there; the message names the place, the reason and what to do."""


@dataclass(frozen=True)
class Kind:
    """A kind of result.

    Args:
        name: in messages, such as "a table of predictions".
        suffixes: that its files may have, lower case.
        is_one: whether a file that exists is an earlier result of this kind; it may hold anything.
        is_input: whether such a file would be read as an input where it lies among inputs, as a picture would.
    """

    name: str
    suffixes: tuple[str, ...]
    is_one: Callable[[Path], bool]
    is_input: bool = False


def output_path(text: str | os.PathLike[str]) -> Path:
    """The path that the user means; ``-`` is standard output."""
    return STDOUT if os.fspath(text) == "-" else Path(text)


def _descriptor(path: Path) -> int | None:
    """The descriptor of this process that a path names."""
    found = re.fullmatch(rf"(?:/dev|/proc/(?:self|{os.getpid()}))/fd/(\d+)", str(path))
    return int(found[1]) if found else _DESCRIPTORS.get(str(path))


def is_stream(path: Path) -> bool:
    """Whether ``path`` names a pipe, a character device, or a descriptor of this process."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def check_output(path: Path, kind: Kind, *, inputs: Iterable[str | Path] = (), overwrite: bool = False) -> None:
    """Refuse a place that a result of this ``kind`` must not go to.

    Args:
        path: where it would be written.
        kind: what it is.
        inputs: files and folders that are read; a result takes no input's place, whatever ``overwrite`` says.
        overwrite: let it replace a file of another kind or origin.

    Raises:
        OutputError: with the reason.
        OSError: if the place cannot be looked at.
    """
    if is_stream(path):
        return
    if path.suffix and path.suffix.lower() not in kind.suffixes:
        raise OutputError(
            f"{path}: {kind.name} ends in {', '.join(kind.suffixes)}, not in {path.suffix}; choose another name"
        )
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise OutputError(f"{path}: is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise OutputError(f"{path}: is {_IRREGULAR.get(stat.S_IFMT(mode), 'no regular file')}; name a file")
    mine = path.stat().st_size == 0 or kind.is_one(path)
    for given in map(Path, inputs):
        if given.is_file() and given.samefile(path):
            raise OutputError(f"{path}: is one of the inputs; choose another name for the result")
        inside = given.is_dir() and path.resolve().is_relative_to(given.resolve())
        if inside and (kind.is_input or not mine):
            raise OutputError(f"{path}: lies among the inputs, in {given}; choose another name for the result")
    if not mine and not overwrite:
        raise OutputError(
            f"{path}: exists and is not {kind.name} that was written here; choose another name, or say `overwrite`"
        )


@contextlib.contextmanager
def _open_stream(path: Path) -> Iterator[BinaryIO]:
    descriptor = _descriptor(path)
    # Through the descriptor itself: a redirected one would be truncated and written twice by its name.
    target = path if descriptor is None else os.dup(descriptor)
    with open(target, "wb") as stream:  # noqa: PTH123  # or a descriptor
        yield stream


@contextlib.contextmanager
def output_file(path: Path, stream_suffix: str = "") -> Iterator[Path]:
    """A temporary path, for a writer that wants one: it takes the place of ``path`` when the block ends well, or goes
    down the stream that ``path`` is; it then ends in ``stream_suffix``.

    Raises:
        OSError: if it cannot be written.
    """
    if not is_stream(path):
        with atomic_path(path) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / f"output{stream_suffix}"
        yield temporary
        with temporary.open("rb") as written, _open_stream(path) as stream:
            shutil.copyfileobj(written, stream)


@contextlib.contextmanager
def output_text(path: Path) -> Iterator[TextIO]:
    """A text file, UTF-8, lines as they are written: into a stream at once, into a file when the block ends well.

    Names that are not valid Unicode are written with escapes rather than not at all.

    Raises:
        OSError: if it cannot be written.
    """

    def text(binary: BinaryIO) -> TextIO:
        return io.TextIOWrapper(binary, "utf-8", "backslashreplace", newline="", line_buffering=is_stream(path))

    if is_stream(path):
        with _open_stream(path) as stream, text(stream) as file:
            yield file
    else:
        with atomic_path(path) as temporary, text(temporary.open("wb")) as file:
            yield file

"""Files that are whole or not there: atomic writes, JSON, lines of JSON; and how they are spoken of."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp(\.\w+)?")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends well and vanishes when it does not.

    The folder is made if need be; the suffix is kept, so that writers that look at it work. A link stays one: the file
    that it leads to is replaced, and keeps its permissions. Raises OSError if the folder cannot be made or written.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.tmp{target.suffix}")
    try:
        temporary.touch()
        usual = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(usual)  # some writers replace it by a file that only its owner may read
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a file is what :func:`atomic_path` leaves where its process is killed."""
    return bool(_TEMPORARY.fullmatch(path.name)) and path.is_file()


def finite(value: Any) -> Any:
    """``value`` as it comes back from JSON, with NaN and infinities replaced by None."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as indented JSON, atomically. Numbers that are not finite become null.

    Raises TypeError if ``obj`` holds something JSON cannot, OSError if the file cannot be written.
    """
    text = json.dumps(finite(obj), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def append_jsonl(path: str | os.PathLike[str], obj: Mapping[str, Any]) -> None:
    """Append ``obj`` as one line of JSON, as :func:`write_json` has it, but not atomically.

    A line that an interrupted run left unfinished is closed first.
    """
    target = Path(path)
    line = json.dumps(finite(dict(obj)), ensure_ascii=False, allow_nan=False) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())

"""What a file may hold in torch's format before archives, looked at before it is loaded."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from convnextv2.weights.guard import MOST_PICKLE, CheckpointError, check_pickle


def check_old_format(path: Path) -> None:
    """Refuse a file that names what is not harmless, or lacks the numbers of a tensor.

    It is made of pickles, one after the other, and then the numbers.

    Raises:
        CheckpointError: with the reason.
    """
    with path.open("rb") as file:
        start = io.BytesIO(file.read(MOST_PICKLE))
    parts = 5  # a magic number, a version, the system, the content, the keys of the storages whose numbers follow
    for _ in range(parts):
        if not check_pickle(start, path):
            return
    start.seek(0)
    used: set[Any] = set()
    try:
        *_, stored = (_Storages(start, used).load() for _ in range(parts))
        missing = used.difference(stored)
    except Exception as error:
        raise CheckpointError(f"{path}: truncated or damaged ({type(error).__name__} in what it says)") from error
    if missing:  # torch would take what happens to lie in memory
        raise CheckpointError(f"{path}: truncated or damaged, it lacks the numbers of {len(missing)} of its tensors")


class _Inert(dict[Any, Any]):
    """Stands for whatever a pickle names or makes: nothing is called, imported or kept."""

    def __new__(cls, *args: Any, **named: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__()

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


class _Storages(pickle.Unpickler):
    """Reads a pickle without making what it describes, and adds the keys of the storages in it to ``used``."""

    def __init__(self, file: io.BytesIO, used: set[Any]) -> None:
        super().__init__(file)
        self._used = used

    def find_class(self, module: str, name: str) -> type[_Inert]:
        return _Inert

    def persistent_load(self, identifier: Any) -> _Inert:
        kind, _, key, *_ = identifier
        if kind in ("storage", b"storage"):
            self._used.add(key)
        return _Inert()

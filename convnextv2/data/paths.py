"""A million paths without a million objects."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray


class PathList(Sequence[Path]):
    """Paths of files below a folder, kept as one text; a :class:`~pathlib.Path` is made when it is asked for.

    Processes that are forked share the text, where each would come to copy a list of objects by counting references.

    ``text`` are the names, each with a zero byte behind it.

    Args:
        root: the folder.
        names: of the files, relative to it, as the file system has them.
        listed: whether an earlier listing was taken for what the folder holds.
    """

    def __init__(self, root: Path, names: Sequence[str], *, listed: bool = False) -> None:
        self._set(root, os.fsencode("\0".join((*names, ""))), listed)

    def _set(self, root: Path, text: bytes, listed: bool) -> None:
        self.root, self.text, self.listed = root, text, listed
        self._ends: NDArray[np.int64] = np.flatnonzero(np.frombuffer(text, np.uint8) == 0)

    @classmethod
    def of_text(cls, root: Path, text: bytes, *, listed: bool = False) -> PathList:
        """Of the :attr:`text` of another list."""
        found = cls.__new__(cls)
        found._set(root, text, listed)
        return found

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        """Relative to the folder."""
        index = range(len(self))[index]
        return os.fsdecode(self.text[int(self._ends[index - 1]) + 1 if index else 0 : int(self._ends[index])])

    def names(self) -> list[str]:
        """All of them."""
        return os.fsdecode(self.text).split("\0")[:-1]

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> PathList: ...
    def __getitem__(self, index: int | slice) -> Path | PathList:
        if isinstance(index, slice):
            return PathList(self.root, self.names()[index], listed=self.listed)
        return Path(self.root, self.name(index))

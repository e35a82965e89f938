"""Which image each process that loads images is at: it may die of one, and then cannot say so itself."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

SLOTS = 512


class NowReading:
    """Numbers of the images being read, by process, once there is memory that loading processes share."""

    def __init__(self) -> None:
        self._slots: Tensor | None = None

    def share(self) -> None:
        """From now on processes that are started say where they are."""
        self._slots = torch.full((SLOTS, 2), -1).share_memory_()  # process, image

    def begin(self, number: int) -> None:
        """This process goes on to image ``number``; -1 for none."""
        if self._slots is not None and (worker := get_worker_info()) is not None and worker.id < SLOTS:
            self._slots[worker.id] = torch.tensor([os.getpid(), number])

    def of(self, process: int) -> int | None:
        """The image that a process was at when it was last heard of, if it was at one."""
        slots = [] if self._slots is None else self._slots.tolist()
        return next((number for pid, number in slots if pid == process and number >= 0), None)

"""What the processes of a run tell each other while they train, beside gradients: small numbers, host to host."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch

from convnextv2.training.device import Accelerator

LOST = ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out", "socket")
"""Words, one of which is in what torch's libraries say where another process does not answer."""


class ProcessLostError(ValueError):
    """Another process of the run ended, or does not answer."""


class Exchange:
    """Numbers over all processes. A device is not waited for: they go through gloo, from processor to processor.

    Args:
        accelerator: of the run.
        minutes: after which a process that does not answer is given up.
    """

    def __init__(self, accelerator: Accelerator, minutes: float) -> None:
        self._several = accelerator.num_processes > 1
        self._processes = accelerator.num_processes
        self._group: Any = None
        if self._several:
            # Of axes of size 1, which may have any stride; DDP copies such gradients, which are small.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=minutes))

    def highest(self, value: int) -> int:
        """The highest of the processes' values, in all of them."""
        if not self._several:
            return value
        shared = torch.tensor(value, dtype=torch.int64)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, self._group)
        return int(shared)

    def mean(self, values: Sequence[float]) -> list[float]:
        """Means of the processes' values, the same bits in all of them."""
        if not self._several:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.SUM, self._group)
        return (shared / self._processes).tolist()


@contextlib.contextmanager
def told_if_lost(options: Any) -> Iterator[None]:
    """Turn what torch raises where another process is gone into ProcessLostError, in one line."""
    try:
        yield
    except RuntimeError as error:
        text, processes = str(error).lower(), int(os.environ.get("WORLD_SIZE", "1"))
        lost = isinstance(error, torch.distributed.DistError) or any(word in text for word in LOST)
        if processes == 1 or not lost:
            raise
        raise ProcessLostError(
            f"process {os.environ.get('RANK')}: another process of the run ended, and says why, or "
            f"did not answer for {options.timeout_minutes:g} minutes (`timeout_minutes`)"
        ) from error

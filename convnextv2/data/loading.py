"""Batches: the order of an epoch, seeds, and the loader."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def derived_seed(*words: int) -> int:
    """A seed for the stream named by ``words``, such as (seed, epoch, process)."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


class EpochSampler(Sampler[int]):
    """A permutation that depends on (seed, epoch) alone, the same in every process."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        yield from torch.randperm(self.length, generator=generator).tolist()


def _start_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends its workers


def make_loader(dataset: Dataset[Any], batch_size: int, workers: int, sampler: Sampler[int] | None = None) -> Any:
    """Batches of a data set: shuffled by ``sampler`` with incomplete ones dropped, or all in order without one."""
    batches: dict[str, Any] = {"batch_size": batch_size, "sampler": sampler, "drop_last": sampler is not None}
    processes: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    pinned = torch.cuda.is_available()
    return DataLoader(dataset, pin_memory=pinned, worker_init_fn=_start_worker, **batches, **processes)

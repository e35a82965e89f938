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
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        yield from torch.randperm(self.length, generator=generator).tolist()


def _start_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends its workers


def make_loader(dataset: Dataset[Any], batch_size: int, workers: int, sampler: Sampler[int] | None = None) -> Any:
    """Batches of a data set: shuffled by ``sampler`` with incomplete ones dropped, or all in order without one."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler is not None,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        collate_fn=getattr(dataset, "collate", None),
    )

"""Batches: the order of an epoch, seeds, and the loader."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from convnextv2.data.worker_signals import give_way, leave_signals_to_main


@contextlib.contextmanager
def process_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are forked where the system can; OSError if one of them is ended from outside."""
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    try:
        with ProcessPoolExecutor(processes, context) as pool:
            yield pool
    except BrokenExecutor as error:
        told = "a process was ended from outside, as happens where memory is short; use fewer `processes`"
        raise OSError(told) from error


def derived_seed(*words: int) -> int:
    """A seed for the stream named by ``words``, such as (seed, epoch, process)."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


class EpochSampler(Sampler[int]):
    """A permutation that depends on (seed, epoch) alone, the same in every process.

    Args:
        length: of the data set.
        seed: of the run.
        multiple: an epoch takes as many numbers of the permutation as this divides.
    """

    def __init__(self, length: int, seed: int, multiple: int = 1) -> None:
        self.length, self.seed, self.multiple = length, seed, multiple
        self.epoch, self.start = 0, 0  # the number of the permutation, from 0, that comes first

    def __len__(self) -> int:
        return max(0, (self.length - self.start) // self.multiple * self.multiple)

    def order(self) -> list[int]:
        """The permutation of the epoch, whole."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        return torch.randperm(self.length, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        yield from self.order()[self.start : self.start + len(self)]


def make_loader(
    dataset: Dataset[Any], batch_size: int, workers: int, sampler: Sampler[int] | None = None, gives_way: bool = False
) -> Any:
    """Batches of a data set: shuffled by ``sampler`` with incomplete ones dropped, or all in order without one."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler is not None,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=give_way if gives_way else leave_signals_to_main,
        collate_fn=getattr(dataset, "collate", None),
    )

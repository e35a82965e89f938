"""What is drawn for a sample of a run follows from the seed, the epoch and the sample's place in the epoch's order.

It is the same in any number of processes, with any accumulation, and wherever a run was resumed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from convnextv2.data.loading import derived_seed
from convnextv2.models.layers import DropPath

MASKS, DROPS, MIXES, OTHERS = range(1, 5)
"""Streams of numbers."""
PER_COUNT = 8
"""Numbers of 32 bits that Philox gives for each of its counts."""


class Draws:
    """Numbers for the samples of the batch at hand.

    Batches are taken in turn by the processes, so those of an update are the same places however they are shared.

    Args:
        seed: of the run.
        batch_size: samples of a batch.
        process: number, from 0, of this process.
    """

    def __init__(self, seed: int, batch_size: int, process: int = 0) -> None:
        self.seed, self.batch_size, self.process = seed, batch_size, process
        self.epoch, self.first = 0, 0

    def begin(self, epoch: int, done: int) -> None:
        """Go to the batch that this process takes when all have taken ``done`` samples of an epoch.

        Seeds the generators of torch, numpy and Python, too, by the place of the first sample: for what a network or a
        task of one's own draws for a batch as a whole.
        """
        self.epoch, self.first = epoch, done + self.process * self.batch_size
        seed = derived_seed(self.seed, epoch, self.first, OTHERS)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # timm draws from it
        torch.manual_seed(seed)

    def uniform(self, stream: int, count: int, device: torch.device | None = None) -> Tensor:
        """float32 ``[B, count]`` in [0, 1): numbers of a stream for each sample.

        They are drawn by a processor (Philox, which can begin anywhere), the same for every device.
        """
        key = np.random.SeedSequence((self.seed, self.epoch, stream)).generate_state(2, np.uint64)
        counts = -(-count // PER_COUNT)
        generator = np.random.Generator(np.random.Philox(key=key, counter=self.first * counts))
        drawn = torch.from_numpy(generator.random((self.batch_size, counts * PER_COUNT), np.float32)[:, :count])
        if device is None or device.type != "cuda":
            return drawn
        return drawn.contiguous().pin_memory().to(device, non_blocking=True)  # the device is not waited for

    def mix(
        self, mixing: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], images: Tensor, labels: Tensor, views: int = 1
    ) -> Tensor:
        """Targets ``[B, K]`` after ``mixing``, timm's, has mixed each image with its neighbour, in place.

        Neighbours, the first and second image, the third and fourth and so on, are in one batch however an update is
        shared; each pair has numbers of its own. Of ``views`` crops of an image, which stand together, each is mixed
        with the neighbour's crop of the same number.
        """
        targets = []
        for start in range(0, len(images), 2 * views):
            for first in range(start, start + views):
                place, pair = self.first + first, slice(first, first + views + 1, views)
                np.random.seed(derived_seed(self.seed, self.epoch, place, MIXES))  # noqa: NPY002  # as above
                mixed, target = mixing(images[pair], labels[pair])
                if mixed.data_ptr() != images[pair].data_ptr():
                    images[pair] = mixed
                targets.append(target)
        return torch.stack(targets).unflatten(0, (-1, views)).transpose(1, 2).flatten(0, 2)


@contextmanager
def dropping(model: nn.Module) -> Iterator[Callable[[Draws], None]]:
    """Inside the block drop path takes its numbers from the samples' own: call what this yields before every batch."""
    layers = [module for module in model.modules() if isinstance(module, DropPath) and module.rate > 0]

    def give(draws: Draws) -> None:
        if layers:
            device = next(model.parameters()).device
            columns = draws.uniform(DROPS, len(layers), device).T.contiguous()
            for layer, column in zip(layers, columns, strict=True):
                layer.noise = column

    try:
        yield give
    finally:
        for layer in layers:
            layer.noise = None

"""How the images of a run get to its device, and how long the loop waits for them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from convnextv2.data.batches import Samples, take_apart
from convnextv2.data.cache import cached
from convnextv2.data.datasets import ImageDataset
from convnextv2.data.loading import make_loader
from convnextv2.training.feeding_options import needed_side


@dataclass
class Feed:
    """Batches of a part of the data, floats on the device of the run.

    Args:
        loader: as accelerate prepared it.
        finish: makes batches of what comes from it.
        waited: seconds that the last pass waited for the loader.
    """

    loader: Any
    finish: Callable[[Any], Any]
    waited: float = field(default=0.0, init=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.waited, batches, done = 0.0, iter(self.loader), object()
        while True:
            start = time.perf_counter()
            batch = next(batches, done)
            self.waited += time.perf_counter() - start
            if batch is done:
                return
            yield self.finish(batch)

    def close(self) -> None:
        """End the loader's processes. Left to the collection of garbage, which takes their queues away before it tells
        them, each keeps whatever the program does next waiting for five seconds."""
        iterator = getattr(self.loader, "_iterator", None)  # torch has no public way
        getattr(iterator, "_shutdown_workers", lambda: None)()

    def share(self, seconds: float, before: float = 0.0) -> float:
        """Of an epoch of so many seconds that was waited for the loader, ``before`` this pass and in it."""
        waited = before + self.waited
        return round(waited / max(seconds, waited, 1e-9), 4)


def passes_for(saved: dict[str, Any] | None, min_steps: int, images: int, options: Any, processes: int) -> int:
    """How often an epoch goes through the images so that the run has at least ``min_steps`` updates; as before where a
    run is resumed, whose progress is ``saved``.

    The number of epochs is left alone: what is done after each, validation above all, may take longer than one pass
    through a small set.
    """
    if saved is not None:
        return int(saved.get("passes", 1))
    batches = math.ceil(min_steps / options.epochs) * options.accum * processes
    return max(1, math.ceil(batches * (options.batch_size // options.views) / images))


def fitting_accum(options: Any, images: int, processes: int) -> int:
    """``accum``, lowered to what an epoch of so many images has batches for: at least one update."""
    return min(options.accum, images // (options.batch_size // options.views * processes))


def make_samples(
    parts: Sequence[ImageDataset],
    options: Any,
    memory_format: torch.memory_format,
    say: Callable[[str], None],
    passes: int = 1,
) -> list[Samples]:
    """What the loaders of a run read: the part to train on, ``passes`` times an epoch, and the others.

    Raises ValueError if an option does not fit the data.
    """
    training = parts[0]
    taken = take_apart(training.transform)
    crop = None if taken is None else taken.crop
    if options.cache is not None:
        crops = [step.scale[0] for step in getattr(training.transform, "transforms", ()) if hasattr(step, "scale")]
        side = options.cache_side or needed_side(options.size, min(crops, default=1.0))
        for part in parts:
            part.source = cached(part.source, options.cache, side, say)
    on_device = options.augment_on == "device"
    if crop is None and (on_device or options.resize != "pillow"):
        name = "`augment_on` device" if on_device else f"`resize` {options.resize}"
        raise ValueError(
            f"{name} knows crops and flips of images of 1 or 3 channels alone: leave it out, or `auto_augment`, "
            "`color_jitter` and `random_erasing`"
        )
    if passes > 1:
        say(f"an epoch goes through the {len(training)} images {passes} times, for `min_steps`")
    how: dict[str, Any] = {"views": options.views, "resizer": options.resize, "on_device": on_device}
    first = Samples(training, **how, passes=passes, memory_format=memory_format)
    return [first, *(Samples(part, memory_format=memory_format) for part in parts[1:])]


def fitting_batch(size: int, views: int, fit: Callable[[int], int]) -> int:
    """The largest batch of at most ``size`` crops that ``fit`` takes, and raises no error for, and ``views`` divide."""
    size = fit(size)
    while size % views:
        size = fit(size - 1)
    return size


def make_feeds(accelerator: Any, samples: Sequence[Samples], options: Any, sampler: Any) -> list[Feed]:
    """Loaders of a run, prepared; the one to train with first. ``batch_size`` counts crops."""
    first, *others = samples
    for one in samples if options.workers else ():
        one.images.now_reading.share()
    beside = accelerator.device.type == "cpu"
    loaders = [make_loader(first, options.batch_size // options.views, options.workers, sampler, gives_way=beside)]
    loaders += [make_loader(other, options.batch_size, options.workers, gives_way=beside) for other in others]
    return [Feed(accelerator.prepare(loader), one.finish) for loader, one in zip(loaders, samples, strict=True)]

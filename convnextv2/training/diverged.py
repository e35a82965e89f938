"""What is written down where a run diverges: for whoever has to find out why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convnextv2.data.loading import EpochSampler
from convnextv2.data.names import name_of
from convnextv2.data.sources import Source
from convnextv2.files import write_json
from convnextv2.training.sharding import full
from convnextv2.training.watching import DivergedError, Watch

NAME = "diverged.json"


@contextlib.contextmanager
def written_if_diverged(
    folder: Path, watch: Watch, model: nn.Module, source: Source, sampler: EpochSampler, images: int
) -> Iterator[None]:
    """Write ``diverged.json`` in ``folder``, in the first process, where the block raises DivergedError.

    It holds the step, the epoch from 1, the learning rate, the last losses and norms of the gradient, the norms of the
    weights of each part of the network, and the files of the batch, of all processes, that the loss was of.

    Args:
        source, sampler: of the data, and of the order in which an epoch takes it.
        images: that all processes have in a batch.
    """
    try:
        yield
    except DivergedError as error:
        norms = weight_norms(model)  # all processes have diverged, and each may have a part of the weights
        if watch.accelerator.is_main_process:
            about = {"message": str(error), "step": error.step, "epoch": watch.done + 1, "learning_rate": watch.lr}
            about |= {"updates": list(watch.recent), "weight_norms": norms}
            first = None if error.batch is None else error.batch * images
            places = [] if first is None else sampler.order()[first : first + images]
            about["files"] = [str(name_of(source, place % len(source))) for place in places]
            with contextlib.suppress(OSError):  # the error itself is what has to be told
                write_json(folder / NAME, about)
        raise


@torch.no_grad()
def weight_norms(model: nn.Module) -> dict[str, float]:
    """Norm of the weights of each part of a network: two levels of its names."""
    parts: dict[str, list[Any]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(".".join(name.split(".")[:3]), []).append(parameter)
    return {name: float(full(nn.utils.get_total_norm(tensors))) for name, tensors in parts.items()}

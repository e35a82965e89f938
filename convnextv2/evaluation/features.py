"""Features of images, as a frozen network gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convnextv2.data.datasets import ImageDataset, PredictDataset
from convnextv2.data.plain import PlainDataset
from convnextv2.data.sources import DataError
from convnextv2.evaluation.inference import Inference
from convnextv2.models.fcmae import FCMAE
from convnextv2.models.modes import evaluation_mode
from convnextv2.models.pooling import POOLINGS, Maps, maps_of


@dataclass(frozen=True, eq=False)
class Features:
    """Features of images that could be read, on the processor.

    Args:
        values: float32 ``[N, F]``.
        labels: int64 ``[N]``, index into ``classes``; -1 where the images have none.
        files: what the images are called.
        classes: names of the labels.
        unreadable: images that are not among them, and why.
    """

    values: Tensor
    labels: Tensor
    files: tuple[Path, ...]
    classes: tuple[str, ...] = ()
    unreadable: tuple[tuple[Path, str], ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


def pooled(features: Maps, pooling: str) -> Tensor:
    """float32 ``[B, C]`` of a map ``[B, C, H, W]``: the mean over its cells; or ``[B, 2C]``: mean, then standard
    deviation, which is 0 for a single cell; with ``stages`` that of each of several maps, in order."""
    if isinstance(features, Sequence):
        return torch.cat([pooled(one, "mean_std") for one in features], 1)
    cells = features.float().flatten(2)
    mean = cells.mean(2)
    return mean if pooling == "mean" else torch.cat((mean, cells.std(2, correction=0)), 1)


class Pooled(nn.Module):
    """Images to the features of a network, pooled."""

    def __init__(self, network: Any, pooling: str) -> None:
        super().__init__()
        self.network, self.pooling = network, pooling

    def forward(self, images: Tensor) -> Tensor:
        return pooled(maps_of(self.network, images, self.pooling), self.pooling)


def extract_features(
    network: nn.Module,
    images: ImageDataset | PredictDataset,
    *,
    pooling: str = "mean",
    batch_size: int = 64,
    device: str | torch.device | None = None,
    workers: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Features:
    """Features of the last stage, or of all, in one pass, of every image without augmentation, in the data set's order.

    They are the encoder's own, float32, before the final norm: that belongs to the head, and a pre-trained encoder has
    none. A processor runs them on the compiled kernels, as ``runs_on`` of the network says.

    Args:
        network: an encoder, a classifier, a masked autoencoder, or another network whose ``forward_features`` gives
            ``[B, C, H, W]``. It computes in evaluation mode; each of its modules gets its own mode back.
        pooling: ``mean`` over the cells of the map, or ``mean_std``: :func:`pooled`; ``stages`` for that of all stages,
            of networks of ours.
        device: where to compute; the network is moved there, and stays. None for where it is.
        workers: processes that decode images; see :class:`~.inference.Inference`.
        progress: wraps the batches.

    Raises:
        ValueError: if there is no such pooling, or not of this network, or features are not finite.
        DataError: if no image can be read.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    dataset = PlainDataset(images) if isinstance(images, ImageDataset) else images
    pooling_network = Pooled(network.encoder if isinstance(network, FCMAE) else network, pooling)
    if device is not None:
        pooling_network.to(device)
    with evaluation_mode(pooling_network):
        inference = Inference(pooling_network, dataset, batch_size, precision="no", compile=None)
        values, readable, unreadable = outputs_of(inference, dataset, workers, progress)
    files = tuple(dataset.files[number] for number in readable)
    if bad := [file for file, good in zip(files, torch.isfinite(values).all(1).tolist(), strict=True) if not good]:
        raise ValueError(
            f"features of {len(bad)} of {len(files)} images are NaN or infinite, first those of {bad[0]}; the training "
            "of the network diverged, or its weights are too large"
        )
    known = getattr(dataset, "labels", None)
    labels = torch.full((len(files),), -1) if known is None else torch.tensor([known[number] for number in readable])
    return Features(values, labels, files, tuple(getattr(dataset, "classes", ())), tuple(unreadable))


def outputs_of(
    inference: Inference,
    dataset: PredictDataset,
    workers: int | None,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> tuple[Tensor, list[int], list[tuple[Path, str]]]:
    """Outputs ``[N, F]`` and numbers of the readable images, and the others with reasons; arguments and DataError as
    :func:`extract_features`."""
    values, readable, unreadable = torch.empty(0, 0), list[int](), list[tuple[Path, str]]()
    for found, numbers, others in outputs_by_batch(inference, dataset, workers, progress):
        if not values.numel():
            values = torch.empty(len(dataset), found.shape[1])
        values[len(readable) : len(readable) + len(numbers)] = found
        readable += numbers
        unreadable += others
    return values[: len(readable)], readable, unreadable


def outputs_by_batch(
    inference: Inference,
    dataset: PredictDataset,
    workers: int | None,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> Iterator[tuple[Tensor, list[int], list[tuple[Path, str]]]]:
    """The same as they come, batch by batch: outputs ``[n, …]`` on the processor, numbers, and the others."""
    readable, first = 0, ""
    for images, numbers, reasons in progress(inference.batches(workers)):
        with torch.inference_mode():
            found = inference.outputs(images)
        good = [place for place, reason in enumerate(reasons) if not reason]
        others = [(dataset.files[int(n)], reason) for n, reason in zip(numbers, reasons, strict=True) if reason]
        readable, first = readable + len(good), first or next((f"{file}: {reason}" for file, reason in others), "")
        yield found[good].cpu(), numbers[good].tolist(), others
    if not readable:
        raise DataError(f"none of the {len(dataset)} images can be read: {first}")

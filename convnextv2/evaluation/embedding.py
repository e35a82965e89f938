"""Features of all images of a folder, into a file: of a checkpoint's encoder, or of one in an ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convnextv2.data.decoding import USUAL, Wanted
from convnextv2.data.names import shown
from convnextv2.data.reading import as_trained
from convnextv2.data.whole import WholeDataset, build_whole_dataset
from convnextv2.evaluation.choices import AS_THE_MODEL, DTYPES, EMBEDDINGS
from convnextv2.evaluation.feature_files import feature_file
from convnextv2.evaluation.features import Features, Pooled, outputs_by_batch, pooled
from convnextv2.evaluation.frozen import load_encoder
from convnextv2.evaluation.inference import Inference
from convnextv2.evaluation.onnx_network import load_onnx
from convnextv2.models.layers import EPS
from convnextv2.models.modes import evaluation_mode
from convnextv2.models.pooling import POOLINGS, maps_of, pool, pooling_of
from convnextv2.weights.checkpoint import as_checkpoint
from convnextv2.weights.guard import CheckpointError
from convnextv2.weights.reading import read_checkpoint


@dataclass(frozen=True)
class Embedder:
    """A network that gives features, and how its images are prepared.

    Args:
        network: images ``[B, C, H, W]`` to maps ``[B, D, h, w]``, or to features ``[B, D]`` that are pooled already.
        pooling: how maps are pooled, one of :data:`~convnextv2.models.pooling.POOLINGS`; None where they are.
        about: what is said about the features in a file.
        reading: what the checkpoint says about how its images are read.
    """

    network: nn.Module
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    img_size: tuple[int, int]
    pooling: str | None
    about: Mapping[str, Any]
    reading: Mapping[str, Any] = field(default_factory=dict)

    def dataset(self, data: str | Path, wanted: Wanted = USUAL) -> WholeDataset:
        """The images of ``data``, as :func:`~convnextv2.data.whole.build_whole_dataset` finds them, read as those of
        the training were."""
        wanted = as_trained(wanted, self.reading)
        return build_whole_dataset(data, self.img_size, self.in_chans, self.mean, self.std, wanted)

    def pool(self, outputs: Tensor) -> Tensor:
        """Features ``[B, F]`` of what the network gave."""
        return outputs if self.pooling is None else pooled(outputs, self.pooling)


@dataclass(frozen=True, eq=False)
class Embedded(Features):
    """Features of images that could be read; ``numbers`` are these images' in the data set."""

    numbers: tuple[int, ...] = ()


class _AsTheModel(nn.Module):
    """Up to the head of a classifier: pooled its way, then its final norm."""

    def __init__(self, encoder: Any, head: Mapping[str, Tensor], pooling: str) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.norm = nn.LayerNorm(head["norm.weight"].numel(), eps=EPS)
        self.norm.load_state_dict({name: head[f"norm.{name}"] for name in ("weight", "bias")})

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(pool(maps_of(self.encoder, images, self.pooling), self.pooling))


def load_embedder(
    checkpoint: str | Path,
    *,
    pooling: str | None = None,
    device: str | torch.device = "cpu",
    img_size: tuple[int, int] | None = None,
) -> Embedder:
    """What embeds images, from a checkpoint of any layout, a run folder, or an ONNX file (``.onnx``).

    Args:
        pooling: ``mean`` over the cells of the last map, ``mean_std``, or ``stages``, which is that of the maps of all
            stages, before the final norm; ``model``: what the head of the classifier is given, pooled its way and
            normalised, and the mean where there is no norm. None takes the mean, and an ONNX file's own features where
            they are pooled already.
        img_size: (H, W) in pixels; None takes the file's.

    Raises:
        CheckpointError: if the file cannot be read, or has no encoder.
        ValueError: if there is no such pooling, or it or the size is not to be had.
    """
    if pooling is not None and pooling not in EMBEDDINGS:
        raise ValueError(f"pooling must be one of {', '.join(EMBEDDINGS)}, got {pooling!r}")
    if str(checkpoint).lower().endswith(".onnx"):
        return _of_onnx(Path(checkpoint), pooling, torch.device(device), img_size)
    read = as_checkpoint(checkpoint)
    frozen = load_encoder(read, device=device, img_size=img_size)
    network: nn.Module = frozen.model
    how, norm = pooling or "mean", False
    if how == AS_THE_MODEL:
        weights = read_checkpoint(read)
        norm = "norm.weight" in weights.head
        how = pooling_of(weights.head, weights.config.dims)
        network = _AsTheModel(network, weights.head, how).to(device).eval() if norm else network
    elif how == "stages":
        network = Pooled(network, how)
    config = frozen.model.encoder_config
    prepared = frozen.mean, frozen.std, frozen.img_size
    about = _about(read.path, f"{how}, norm" if norm else how, *prepared)
    maps = how if network is frozen.model else None  # what is around it pools
    return Embedder(network, config.in_chans, *prepared, maps, about, frozen.reading)


def _of_onnx(path: Path, pooling: str | None, device: torch.device, img_size: tuple[int, int] | None) -> Embedder:
    loaded = load_onnx(path, device=device, img_size=img_size)
    network, prepared = loaded.network, loaded.preprocessing
    if not network.maps and pooling not in (None, AS_THE_MODEL):
        raise ValueError(f"{path}: gives features that are pooled already; take the pooling {AS_THE_MODEL}")
    if pooling == "stages":
        raise ValueError(f"{path}: gives the map of the last stage alone; take the pooling mean or mean_std")
    how = (pooling if pooling in POOLINGS else "mean") if network.maps else None
    about = _about(path, how or "of the file", *prepared)
    return Embedder(network, network.channels, *prepared, how, about, loaded.metadata)


def _about(
    path: Path, pooling: str, mean: Sequence[float], std: Sequence[float], img_size: Sequence[int]
) -> dict[str, Any]:
    return {
        "checkpoint": shown(str(path)),
        "pooling": pooling,
        "mean": list(mean),
        "std": list(std),
        "img_size": list(img_size),
    }


def embed(
    embedder: Embedder,
    dataset: WholeDataset,
    output: Path,
    *,
    per_patch: bool = False,
    dtype: str = "float32",
    keep: bool = True,
    batch_size: int = 64,
    workers: int | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Embedded:
    """Write the features of all images that can be read, in the data set's order, batch by batch.

    Args:
        dataset: from :meth:`Embedder.dataset`.
        output: ``.npz`` or ``.parquet``, as :func:`~convnextv2.evaluation.feature_files.feature_file`.
        per_patch: write the map ``[h, w, D]`` of an image instead of its features ``[F]``.
        dtype: of the file, one of :data:`DTYPES`.
        keep: hold the pooled features in memory, for what is made of them; else those returned have no columns.
        workers: processes that decode images; see :class:`~.inference.Inference`.
        progress: wraps the batches.

    Returns:
        What could be read, pooled, float32; ``files`` are the names in the file.

    Raises:
        ValueError: if features are not finite, or have no cells where ``per_patch`` asks for them.
        DataError: if no image can be read. OSError: if the file cannot be written.
    """
    if dtype not in DTYPES:
        raise ValueError(f"features are written as {' or '.join(DTYPES)}, got {dtype!r}")
    if per_patch and embedder.pooling is None:
        raise ValueError("features that are pooled already have no patches; leave the pooling out, or per_patch")
    about = {**embedder.about, "data": dataset.data, "per_patch": per_patch}
    about |= {"pooling": "none"} if per_patch else {}
    values, readable, unreadable = torch.empty(0, 0), list[int](), list[tuple[Path, str]]()
    labels = torch.as_tensor(dataset.labels, dtype=torch.int64)
    with evaluation_mode(embedder.network), feature_file(output, dataset.classes, about) as sink:
        inference = Inference(embedder.network, dataset, batch_size, precision="no", compile=None)
        for outputs, numbers, others in outputs_by_batch(inference, dataset, workers, progress):
            unreadable += others
            if not numbers:
                continue
            features = embedder.pool(outputs)
            if keep:
                if not values.numel():
                    values = torch.empty(len(dataset), features.shape[1])
                values[len(readable) : len(readable) + len(numbers)] = features
            with np.errstate(over="ignore"):  # which is told
                written = (outputs.permute(0, 2, 3, 1) if per_patch else features).numpy().astype(dtype)
            _check_finite(written, [dataset.names[number] for number in numbers], dtype)
            sink.write(written, [dataset.names[number] for number in numbers], labels[numbers].tolist())
            readable += numbers
    names = tuple(Path(dataset.names[number]) for number in readable)
    kept = values[: len(readable)] if keep else torch.empty(len(readable), 0)
    return Embedded(kept, labels[readable], names, tuple(dataset.classes), tuple(unreadable), tuple(readable))


def _check_finite(values: np.ndarray[Any, Any], names: Sequence[str], dtype: str) -> None:
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        first = names[int(np.flatnonzero(~finite)[0])]
        narrow = "; float32 holds larger ones" if dtype == "float16" else ""
        raise CheckpointError(
            f"features of {first} are NaN or infinite in {dtype}: the training of the network diverged, or its "
            f"weights are too large{narrow}"
        )

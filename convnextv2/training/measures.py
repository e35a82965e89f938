"""What a row of the metrics says of the network and the machine beside the loss; and how its pace is told."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convnextv2.models.diversity import feature_diversity
from convnextv2.models.encoder import Encoder
from convnextv2.training.pictures import save_loss_curve

try:
    import resource
except ImportError:  # on Windows, where the memory of a process is not told
    resource = None  # type: ignore[assignment]


@torch.no_grad()
def measures(network: nn.Module, images: Tensor) -> dict[str, float]:
    """Numbers for the row of an epoch.

    Args:
        network: an :class:`~convnextv2.models.encoder.Encoder`, one that has such an ``encoder``, or any other.
        images: ``[B, C, H, W]``, to measure the diversity of the encoder's features on.

    Returns:
        Where there is an encoder ``feature_diversity``, the mean over its stages as the paper has it, and that of each
        stage, ``feature_diversity_1`` to ``_4``; ``weight_norm``, the Euclidean norm of all parameters; and, where it
        is known, ``memory_mib`` of :func:`peak_memory`.
    """
    found = dict[str, float]()
    encoder = getattr(network, "encoder", network)
    if isinstance(encoder, Encoder):
        stages = feature_diversity(encoder, images)
        found["feature_diversity"] = float(torch.tensor(stages).mean())
        found |= {f"feature_diversity_{number}": value for number, value in enumerate(stages, 1)}
    found["weight_norm"] = float(nn.utils.get_total_norm([p.float() for p in network.parameters()]))
    peak = peak_memory(images.device)
    return found if peak is None else {**found, "memory_mib": peak}


def peak_memory(device: torch.device) -> float | None:
    """MiB: on a CUDA device of tensors there, else of this process and all that it holds; None where nobody knows."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def pace(row: Mapping[str, Any], epochs: int) -> str:
    """How fast an epoch was, what it waited for, and how long the training of those that are left will take."""
    left = (epochs - row["epoch"]) * row["seconds"]
    rest = f", {duration(left)} left" if row["epoch"] < epochs else ""
    waited = f"{100 * row['data_wait']:.0f} % waiting for data"
    return f"lr {row['lr']:.2e}, {row['images_per_s']} images/s{rest}, {waited}"


def duration(seconds: float) -> str:
    """Seconds in words, to what matters: ``0.4 s``, ``12 s``, ``3 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def save_losses(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the loss curve, if a row of ``metrics.jsonl`` has a loss: all updates of an epoch may have been left out."""
    losses = [row.get(name) for row in rows for name in ("loss", "train_loss", "val_loss")]
    if any(isinstance(loss, float) and math.isfinite(loss) for loss in losses):
        save_loss_curve(path, rows)

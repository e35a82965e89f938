"""Pictures of a run: reconstructions, loss curves, confusion matrices. PNG files, written atomically.

matplotlib is imported when it draws and never touches pyplot, so no display and no global state is needed.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convnextv2.models.fcmae import FCMAE, pixel_mask
from convnextv2.models.modes import evaluation_mode
from convnextv2.outputs import Kind, output_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MASKED_COLOUR = (0.47, 0.52, 0.62)
"""Slate: told apart from the grays of a gray image."""

DPI, _GAP, HEADING, _LEAST_CELL = 100, 8, 34, 200
_MARK = b"convnextv2 pictures"


def is_ours(path: Path) -> bool:
    """Whether a PNG file was drawn here."""
    with path.open("rb") as file:
        return b"Software\0" + _MARK in file.read(4096)


PICTURE = Kind("a picture", (".png",), is_ours, is_input=True)


@torch.no_grad()
def reconstruction_panels(
    model: FCMAE,
    images: Tensor,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    mask_ratio: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The four pictures of each image, in true colours.

    Args:
        model: the masked autoencoder; its training mode is left as it was.
        images: ``[B, C, H, W]``, normalised with ``mean`` and ``std``.
        mask: ``[B, L]`` or ``[B, gh, gw]``, 1 = masked; drawn from ``generator`` if None.
        generator: source of randomness of the mask.
        mean, std: one number a channel.
        mask_ratio: share to mask where the mask is drawn; the model's own if None.

    Returns:
        Panels ``[B, 4, 3, H, W]`` on the CPU with values in [0, 1], and the mask ``[B, L]``. One channel is shown gray,
        of more than three the first three, of two the first. Predictions of normalised targets are de-normalised with
        each patch's own mean and variance.

    Raises ValueError if shapes do not fit (see :meth:`convnextv2.models.fcmae.FCMAE.forward`).
    """
    images = images.to(next(model.parameters()).device)
    with evaluation_mode(model):
        output = model(images, mask, mask_ratio, generator=generator)
        predicted = model.reconstruct(images, output.pred)
    patch = model.config.encoder.patch_size
    grid_size = images.shape[2] // patch, images.shape[3] // patch
    hidden = pixel_mask(output.mask.cpu(), grid_size, patch)
    original, prediction = (true_colours(x, mean, std) for x in (images, predicted))
    slate = torch.tensor(MASKED_COLOUR).view(1, 3, 1, 1)
    masked = original * (1 - hidden) + slate * hidden
    pasted = original * (1 - hidden) + prediction * hidden
    return torch.stack((original, masked, prediction, pasted), dim=1), output.mask.cpu()


def true_colours(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``[B, C, H, W]`` normalised to ``[B, 3, H, W]`` in [0, 1]; values beyond are clamped, never wrapped."""
    shape = (1, -1, 1, 1)
    values = images.detach().cpu().float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    values = values[:, :3] if values.shape[1] >= 3 else values[:, :1].expand(-1, 3, -1, -1)
    return values.nan_to_num(0.0).clamp(0, 1)


def save_reconstructions(path: str | os.PathLike[str], panels: Tensor, mask: Tensor) -> None:
    """A row per image: original, masked, prediction, and prediction with the visible patches pasted back.

    ``panels`` and ``mask`` are those of :func:`reconstruction_panels`; each pixel gets a whole number of the screen's,
    so that nothing is blurred. Raises OSError if the file cannot be written.
    """
    from torchvision.utils import make_grid

    titles = "original", f"masked ({mask.mean():.0%})", "prediction", "prediction + visible"
    scale = max(1, math.ceil(_LEAST_CELL / panels.shape[-1]))
    cells = panels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = make_grid(cells.flatten(0, 1), len(titles), _GAP, pad_value=1.0).permute(1, 2, 0).numpy()
    total_h, total_w = grid.shape[0] - _GAP + HEADING, grid.shape[1]
    with picture(path, total_w / DPI, total_h / DPI) as figure:
        figure.figimage(grid)
        for column, title in enumerate(titles):
            centre = _GAP / 2 + (column + 0.5) * (cells.shape[-1] + _GAP)
            figure.text(centre / total_w, 1 - HEADING / 2 / total_h, title, ha="center", va="center", size=11)


def save_loss_curve(path: str | os.PathLike[str], metrics: Sequence[Mapping[str, Any]]) -> None:
    """Losses over the epochs, and the top-1 accuracy of the validation part where there is one.

    ``metrics`` has one mapping an epoch, as ``metrics.jsonl``: ``epoch`` and any of ``loss``, ``train_loss``,
    ``val_loss``, ``val_top1`` (per cent). Missing values and NaN leave gaps. Raises ValueError if there is no loss to
    draw, OSError if the file cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    epochs = [row.get("epoch", number) for number, row in enumerate(metrics)]
    top1, *losses = (
        np.array([row.get(name) for row in metrics], dtype=np.float64)  # NaN for None
        for name in ("val_top1", "loss", "train_loss", "val_loss")
    )
    if not any(np.isfinite(values).any() for values in losses):
        raise ValueError(f"no loss to draw in {len(metrics)} epochs; expected 'loss', 'train_loss' or 'val_loss'")
    marker = "o" if len(metrics) <= 30 else None
    with picture(path, 8, 4.5, "constrained") as figure:
        axes = figure.subplots()
        lines = zip(losses, ("training", "training", "validation"), ("C0", "C0", "C1"), strict=True)
        for values, label, colour in lines:
            if np.isfinite(values).any():
                axes.plot(epochs, values, color=colour, label=f"{label} loss", marker=marker, markersize=3)
        axes.set(xlabel="epoch", ylabel="loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        handles = axes.get_lines()
        if np.isfinite(top1).any():
            right = axes.twinx()
            handles += right.plot(epochs, top1, "--", color="C2", label="validation top-1", marker=marker, ms=3)
            right.set_ylabel("top-1 accuracy, %")
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def save_confusion_matrix(
    path: str | os.PathLike[str], matrix: Tensor | NDArray[Any] | Sequence[Sequence[int]], classes: Sequence[str]
) -> None:
    """Confusion matrix ``[K, K]`` of K named classes: counts, rows are true classes, columns predicted ones.

    Colours are shares of the true class, numbers (up to 20 classes) are images. Raises ValueError if the matrix does
    not fit the names, OSError if the file cannot be written.
    """
    counts, k = np.asarray(matrix), len(classes)
    if counts.shape != (k, k) or k == 0:
        raise ValueError(f"expected a matrix [{k}, {k}] for {k} classes, got {counts.shape}")
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros((k, k)), where=totals > 0)
    side, ticks = min(16.0, max(4.5, 2.5 + 0.45 * k)), range(0, k, math.ceil(k / 40))
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in (str(classes[i]) for i in ticks)]
    correct, images = int(np.trace(counts)), int(counts.sum())
    title = f"{correct} of {images} right ({correct / max(1, images):.1%})"
    with picture(path, side + 1, side, "constrained") as figure:
        axes = figure.subplots()
        shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(shown, ax=axes, label="share of the true class", shrink=0.8)
        axes.set_xticks(ticks, names, rotation=90 if k > 5 else 30, ha="center" if k > 5 else "right", parse_math=False)
        axes.set_yticks(ticks, names, parse_math=False)
        axes.set(xlabel="predicted class", ylabel="true class", title=title)
        for (row, column), count in np.ndenumerate(counts if k <= 20 else ()):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{int(count)}", ha="center", va="center", color=colour, fontsize=9)


@contextlib.contextmanager
def picture(path: str | os.PathLike[str], width: float, height: float, layout: Any = None) -> Iterator[Figure]:
    """A white figure of that size in inches, to be drawn in; written when the block ends well."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    yield figure
    with output_file(Path(path)) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box for letters that the font lacks will do
        figure.savefig(temporary, format="png", metadata={"Software": _MARK.decode()})

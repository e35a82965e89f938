"""Classes of the pixels of images of any size, by windows that overlap: their logits are blended where they do."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from convnextv2.data.transforms import Statistics
from convnextv2.segmentation.config import CENTRE_OVERLAP
from convnextv2.segmentation.transforms import columns, normalised

MOST_OVERLAP = 0.9


class Pixels(Protocol):
    """An image ``[H, W, C]``, a tensor or what gives parts of it as tensors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C)."""

    def __getitem__(self, part: tuple[slice, slice], /) -> Tensor:
        """Rows and columns."""


@dataclass(frozen=True)
class Windows:
    """How an image is covered.

    Args:
        size: (H, W) in pixels of a window.
        overlap: share of its sides, at least, that lies in the next one too; where windows overlap their logits are
            summed with weights that fall towards the edges.
    """

    size: tuple[int, int]
    overlap: float = CENTRE_OVERLAP

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= MOST_OVERLAP:
            raise ValueError(f"overlap must be a share from 0 to {MOST_OVERLAP}, got {self.overlap}")

    def starts(self, length: int, axis: int) -> list[int]:
        """Where windows begin along an axis of an image: evenly spaced, the first and the last at its ends."""
        size = self.size[axis]
        if length <= size:
            return [0]
        step = max(1, size - math.ceil(size * self.overlap))
        count = math.ceil((length - size) / step)
        return [round(number * (length - size) / count) for number in range(count + 1)]

    def weights(self) -> Tensor:
        """``[H, W]``, 1 in the middle, falling to the edges where windows overlap."""
        ramps = []
        for size in self.size:
            edge = max(1.0, size * self.overlap)
            place = torch.arange(size) + 0.5
            ramps.append(torch.minimum(place, size - place).div(edge).clamp(max=1))
        return ramps[0][:, None] * ramps[1][None, :]


class _Canvas:
    """Sums of the logits of one image, of as many rows as a window has; rows that are done become classes, which are
    kept unless somebody takes them."""

    def __init__(self, image: Pixels, windows: Windows, taken: Callable[[Tensor], object] | None) -> None:
        self.image, self.windows, self.rows = image, windows, image.shape[0]
        self.classes = torch.empty(image.shape[:2] if taken is None else (0, 0), dtype=torch.uint8)
        self._taken = taken
        self._sum: Tensor | None = None
        self._top = 0
        rows, cols = (windows.starts(length, axis) for axis, length in enumerate(image.shape[:2]))
        self.places = [(top, left) for top in rows for left in cols]
        self.left = len(self.places)

    def part(self, top: int, left: int) -> Tensor:
        """Pixels ``[h, w, C]`` of the window there, of which the image may fill a part."""
        return self.image[top : top + self.windows.size[0], left : left + self.windows.size[1]]

    def add(self, top: int, left: int, logits: Tensor) -> None:
        """Logits ``[K, H, W]``, weighted, of the window there; from the top down."""
        height, width = (min(own, whole) for own, whole in zip(self.windows.size, self.image.shape[:2], strict=True))
        if self._sum is None:
            self._sum = logits.new_zeros(logits.shape[0], height, self.image.shape[1])
        if top > self._top:
            self._finish(top)
        self._sum[:, :, left : left + width] += logits[:, :height, :width]
        self.left -= 1
        if not self.left:
            self._finish(self.rows)
            self._sum = None

    def _finish(self, bottom: int) -> None:
        """No window adds to the rows above ``bottom`` any more."""
        assert self._sum is not None
        count = bottom - self._top
        classes = self._sum[:, :count].argmax(0).to("cpu", torch.uint8)
        if self._taken is None:
            self.classes[self._top : bottom] = classes
        else:
            self._taken(classes)
        self._sum = torch.cat([self._sum[:, count:], torch.zeros_like(self._sum[:, :count])], dim=1)
        self._top = bottom


@torch.no_grad()
def class_maps(
    network: Callable[[Tensor], Tensor],
    images: Iterable[Pixels],
    statistics: Statistics,
    windows: Windows,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    taken: Callable[[Tensor], object] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Iterator[Tensor]:
    """The likeliest class of every pixel, uint8 ``[H, W]`` on the processor, of one image after the other.

    Windows of several images share a batch. Beside an image and its classes, ``K × window height × image width`` logits
    are held.

    Args:
        network: from ``[B, C, h, w]``, normalised, on the device, to logits ``[B, K, h, w]``.
        images: pixels ``[H, W, C]``, as :func:`~convnextv2.segmentation.transforms.pixels` has them.
        statistics: mean and standard deviation of each channel.
        batch_size: windows at a time.
        taken: is given the rows that are done, uint8 ``[h, W]``, from the top down, of the one image that there is;
            its map then is empty.
        progress: wraps the windows of an image.

    Raises:
        ValueError: if logits are not finite.
    """
    mean, std = (values.to(device) for values in columns(statistics))
    weights = windows.weights().to(device)
    waiting, canvases = deque[tuple[_Canvas, int, int]](), deque[_Canvas]()

    def run() -> None:
        chosen = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
        inputs = torch.zeros(len(chosen), len(mean), *windows.size, device=device)
        for window, (canvas, top, left) in zip(inputs, chosen, strict=True):
            part = canvas.part(top, left).to(device).permute(2, 0, 1)
            window[:, : part.shape[1], : part.shape[2]] = normalised(part, mean, std)
        outputs = network(inputs).float()
        if not torch.isfinite(outputs).all():
            raise ValueError("logits are NaN or infinite: the training of the network diverged")
        for logits, (canvas, top, left) in zip(outputs * weights, chosen, strict=True):
            canvas.add(top, left, logits)

    for image in images:
        canvas = _Canvas(image, windows, taken)
        canvases.append(canvas)
        for place in progress(canvas.places):
            waiting.append((canvas, *place))
            if len(waiting) == batch_size:
                run()
        while canvases and not canvases[0].left:
            yield canvases.popleft().classes
    while waiting:
        run()
    yield from (canvas.classes for canvas in canvases)

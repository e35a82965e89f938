"""From a raster to a normalised tensor: crops, flips, turns and changes of values, for any number of bands.

Pixels without data are NaN from the crop on, so nothing can mistake what lies under them; in the end they are 0, which
is the band's mean. What is drawn comes from the global generators, as in all transforms: seeded for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from convnextv2.data.augmentation import USUAL_SPAN, BandAugmentation
from convnextv2.data.rasters import Raster
from convnextv2.data.statistics import Ranges
from convnextv2.data.transforms import Augmentation, Statistics, cut_to_aspect

LEAST_VALID = 0.5
"""Share of what a resized pixel is made of that must be data for it to be data."""


class RandomTurn(v2.Transform):
    """A turn by a random multiple of 90°; by 180° or none where an image is no square."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        square = flat_inputs[0].shape[-1] == flat_inputs[0].shape[-2]
        return {"turns": int(torch.randint(4, ())) if square else 2 * int(torch.randint(2, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return torch.rot90(inpt, params["turns"], (-2, -1))


class BandJitter(v2.Transform):
    """Brightness, contrast and noise of each band ``[C, H, W]``, in its own units and within its range."""

    def __init__(self, augmentation: BandAugmentation, statistics: Statistics, ranges: Ranges | None) -> None:
        super().__init__()
        self.wish = augmentation
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in statistics)
        self.limits: Tensor | None = None
        if ranges is not None:
            self.limits = torch.tensor(ranges, dtype=torch.float32).T[:, :, None, None]

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        drawn = 2 * torch.rand(2, *self.mean.shape) - 1
        noise = self.wish.noise * float(torch.rand(()))
        return {"shift": self.wish.brightness * drawn[0], "factor": 1 + self.wish.contrast * drawn[1], "noise": noise}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        shift = params["shift"] * USUAL_SPAN * self.std
        values = (inpt - self.mean) * params["factor"].clamp_min(0) + self.mean + shift
        if params["noise"]:
            values = values + torch.randn(values.shape) * (params["noise"] * self.std)
        return values if self.limits is None else values.maximum(self.limits[0]).minimum(self.limits[1])


class BandDropout(v2.Transform):
    """Some bands ``[C, H, W]`` replaced by their mean, one at least kept; what is no data stays so."""

    def __init__(self, probability: float, mean: Sequence[float]) -> None:
        super().__init__()
        self.probability, self.mean = probability, torch.tensor(mean, dtype=torch.float32)[:, None, None]

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        dropped = torch.rand(len(self.mean)) < self.probability
        dropped[torch.randint(len(dropped), ())] = False
        return {"dropped": dropped[:, None, None]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return torch.where(params["dropped"] & ~inpt.isnan(), self.mean, inpt)


class NativeTransform:
    """To (H, W), and normalised: :meth:`in_units` what a raster becomes, in its own units, and the whole by a call.

    Args:
        size: (H, W) in pixels.
        statistics: mean and standard deviation of each band, in its units.
        crop: one of :data:`~.decoding.CROPS`.
        augmentation: random changes; None for none, and the middle of each image.
        ranges: least and greatest value of each band.
    """

    keeps_no_data = False
    """Whether batches of training have NaN where there is no data, for a loss that leaves it out, instead of 0."""

    def __init__(
        self,
        size: tuple[int, int],
        statistics: Statistics,
        crop: str,
        augmentation: Augmentation | None = None,
        ranges: Ranges | None = None,
    ) -> None:
        if augmentation is not None and (augmentation.color_jitter or augmentation.auto_augment):
            raise ValueError(
                "`color_jitter` and `auto_augment` are for photographs of 8 bits, of 1 or 3 channels; `brightness` and "
                "`contrast` change others, in their own units"
            )
        wish = BandAugmentation() if augmentation is None else augmentation
        self.random = augmentation is not None and not getattr(wish, "still", False)
        self.size, self.statistics, self.crop, self.ranges = size, statistics, crop, ranges
        self._area = v2.RandomResizedCrop(size, wish.crop_scale or (1.0, 1.0)) if self.random else None
        steps = list[Any]()
        if self.random and wish.hflip:
            steps.append(v2.RandomHorizontalFlip(wish.hflip))
        if self.random and isinstance(wish, BandAugmentation):
            if wish.vflip:
                steps.append(v2.RandomVerticalFlip(wish.vflip))
            if wish.turns:
                steps.append(RandomTurn())
            if wish.brightness or wish.contrast or wish.noise:
                steps.append(BandJitter(wish, statistics, ranges))
            if wish.band_dropout and len(statistics[0]) > 1:
                steps.append(BandDropout(wish.band_dropout, statistics[0]))
        if self.random and wish.random_erasing:
            steps.append(v2.RandomErasing(wish.random_erasing, value=list(statistics[0])))
        self._steps = steps
        changing = (BandJitter, BandDropout, v2.RandomErasing)
        self._keeps_values = crop == "native" and not any(isinstance(step, changing) for step in steps)

    def travelling(self, image: Raster) -> Tensor:
        """:meth:`in_units` as ``[H, W, C]``; in the type of the image where no value was changed, and all is data."""
        values = self.in_units(image).permute(1, 2, 0).contiguous()
        kind = image.values.dtype
        if not self._keeps_values or kind.kind == "f" or values.isnan().any():
            return values
        return torch.from_numpy(values.numpy().astype(kind))

    def in_units(self, image: Any) -> Tensor:
        """``[C, H, W]`` of a raster, in its units: float32 with NaN where there is no data."""
        values = self._cropped(image)
        for step in self._steps:
            values = step(values)
        return values

    def __call__(self, image: Any) -> Tensor:
        """float32 ``[C, H, W]``, normalised, 0 where there is no data."""
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in self.statistics)
        return self.in_units(image).sub(mean).div(std).nan_to_num(0.0, 0.0, 0.0)

    def _cropped(self, image: Raster) -> Tensor:
        if self.crop == "native":
            return self._cut(image)
        if self._area is not None:
            found = self._area.make_params([torch.empty(1, *image.shape[:2], device="meta")])
            return resized(_part(image, *(found[name] for name in ("top", "left", "height", "width"))), self.size)
        share = 0.875 if min(self.size) >= 160 else 1.0
        height, width = (round(side / share) for side in self.size)  # as image_transform
        high, wide = cut_to_aspect(image.shape[:2], width / height)
        part = _part(image, (image.shape[0] - high) // 2, (image.shape[1] - wide) // 2, high, wide)
        return F.center_crop_image(resized(part, (height, width)), list(self.size))

    def _cut(self, image: Raster) -> Tensor:
        """A part of the size wanted, at the image's own scale; what lies beyond a small image is no data."""
        rows, columns = (min(side, there) for side, there in zip(self.size, image.shape, strict=False))
        free = image.shape[0] - rows, image.shape[1] - columns
        top, left = (int(torch.randint(one + 1, ())) if self.random else one // 2 for one in free)
        values = _part(image, top, left, rows, columns)
        down, across = self.size[0] - rows, self.size[1] - columns
        if not (down or across):
            return values
        above, before = (int(torch.randint(one + 1, ())) if self.random else one // 2 for one in (down, across))
        return torch.nn.functional.pad(values, (before, across - before, above, down - above), value=float("nan"))


def _part(image: Raster, top: int, left: int, height: int, width: int) -> Tensor:
    part = image[top : top + height, left : left + width]
    return torch.from_numpy(np.ascontiguousarray(part.floats().transpose(2, 0, 1)))


def resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """``[C, h, w]`` with NaN where there is no data, bicubic, to (H, W).

    A pixel is made of the data in it alone (normalised convolution about each band's mean), and is data if they are
    :data:`LEAST_VALID` of it.
    """
    if tuple(values.shape[1:]) == tuple(size):
        return values
    how: Any = {"size": list(size), "interpolation": F.InterpolationMode.BICUBIC, "antialias": True}
    missing = values.isnan()
    if not missing.any():
        return F.resize_image(values, **how)
    centre = values.nanmean((1, 2), keepdim=True).nan_to_num(0.0)
    shifted = F.resize_image(torch.where(missing, 0.0, values - centre), **how)
    share = F.resize_image((~missing).float(), **how)
    return torch.where(share >= LEAST_VALID, shifted / share.clamp_min(LEAST_VALID) + centre, float("nan"))

"""Images travel from the loader as bytes and become normalised floats in the batch, where that is: on the device.
Those of other types travel in their own where no value was changed, else as float32 in their units.

A transform is taken apart where it ends in to-float and normalise; one that goes on with floats (noise erasing, images
of other than 1 or 3 channels) stays whole, and its tensors travel as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from convnextv2.data.crops import RandomCrop, pixels_of, region, sample_words
from convnextv2.data.datasets import ImageDataset, PredictDataset
from convnextv2.data.decoding import UnreadableImageError
from convnextv2.data.resampling import Regions, resample
from convnextv2.data.transforms import Statistics, sample_seed

Places = tuple[int, int, int, int]
"""(seed, epoch, index, view) of a sample."""


@dataclass(frozen=True)
class Taken:
    """A transform, taken apart.

    Args:
        steps: what is done to a decoded image before it becomes numbers, where that is no plain ``crop``.
        crop: a random crop and flip, where that is all.
        random: whether anything is drawn.
        statistics: mean and standard deviation of each channel.
    """

    steps: Sequence[Any]
    crop: RandomCrop | None
    random: bool
    statistics: Statistics

    @property
    def channels(self) -> int:
        return len(self.statistics[0])

    def pixels(self, image: Any, place: Places, resizer: str = "pillow") -> Tensor:
        """uint8 ``[H, W, C]`` of a decoded image; floats by :func:`normalised` are what the transform gives."""
        if self.crop is not None:
            height, width = size_of(image)
            box = self.crop.draw(height, width, sample_words(*place))
            return self.crop.cut(image, box, self.channels, resizer)
        if self.random:
            with sample_seed(*place):
                return self._stepped(image)
        return self._stepped(image)

    def normalised(self, pixels: Tensor, mean: Tensor, std: Tensor, memory_format: torch.memory_format) -> Tensor:
        """Floats of a batch of such pixels: :func:`normalised`."""
        return normalised(pixels, mean, std, memory_format)

    def _stepped(self, image: Any) -> Tensor:
        for step in self.steps:
            image = step(image)
        return pixels_of(image, self.channels)


class NativeTaken:
    """A :class:`~.native_transforms.NativeTransform` as loaders use it: its images travel in their own units."""

    crop = None

    def __init__(self, transform: Any) -> None:
        self._transform, self.statistics = transform, transform.statistics

    @property
    def channels(self) -> int:
        return len(self.statistics[0])

    def pixels(self, image: Any, place: Places, resizer: str = "pillow") -> Tensor:
        """``[H, W, C]`` in the units of the image, by :meth:`~.native_transforms.NativeTransform.travelling`."""
        with sample_seed(*place):
            return self._transform.travelling(image)

    def normalised(self, pixels: Tensor, mean: Tensor, std: Tensor, memory_format: torch.memory_format) -> Tensor:
        """float32 ``[B, C, H, W]``; NaN where there is no data if the transform keeps it, else 0."""
        values = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format, copy=True)
        values = values.sub_(mean).div_(std)
        return values if self._transform.keeps_no_data else values.nan_to_num_(0.0, 0.0, 0.0)


def stacked(samples: Sequence[Tensor]) -> Tensor:
    """Samples of one type as they are, of several as float32."""
    same = len({sample.dtype for sample in samples}) == 1
    return torch.stack(list(samples) if same else [sample.float() for sample in samples])


def native_collate(samples: list[Any]) -> Any:
    """A batch of samples, with labels or without, :func:`stacked`."""
    if isinstance(samples[0], Tensor):
        return stacked(samples)
    return stacked([sample for sample, _ in samples]), torch.tensor([label for _, label in samples])


def size_of(image: Image.Image | NDArray[np.uint8]) -> tuple[int, int]:
    """(H, W) of an image or of pixels ``[H, W, C]``."""
    return image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]


def take_apart(transform: Any) -> Taken | None:
    """The parts of what :func:`~.transforms.image_transform` made; None where it does not end as bytes could."""
    from torchvision import transforms as tv

    *steps, last = getattr(transform, "transforms", [None])
    channels = 3
    if getattr(last, "__reduce__", None) and type(last).__name__ == "itemgetter":  # one of three equal channels
        channels, last = 1, steps.pop() if steps else None
    if not isinstance(last, tv.Normalize) or not steps or not isinstance(steps[-1], tv.ToTensor):
        return None
    mean, std = (torch.as_tensor(values).flatten().tolist()[:channels] for values in (last.mean, last.std))
    if len(mean) != channels:
        return None
    steps = [step for step in steps[:-1] if not _is_idle(step)]
    kinds = [type(step).__name__ for step in steps]
    drawn = not {"Resize", "CenterCrop", "function"}.issuperset(kinds)
    crop = None
    if kinds in (["RandomResizedCropAndInterpolation"], ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]):
        first, flip = steps[0], steps[1].p if len(steps) > 1 else 0.0
        if first.interpolation == tv.InterpolationMode.BICUBIC:
            crop = RandomCrop(tuple(first.size), tuple(first.scale), tuple(first.ratio), flip)
    return Taken(steps, crop, drawn, (tuple(mean), tuple(std)))


def _is_idle(step: Any) -> bool:
    """Whether a step does nothing; what it draws does not matter, for nothing draws after it."""
    return type(step).__name__ == "ColorJitter" and not any((step.brightness, step.contrast, step.saturation, step.hue))


def normalised(pixels: Tensor, mean: Tensor, std: Tensor, memory_format: torch.memory_format) -> Tensor:
    """float32 ``[B, C, H, W]`` from uint8 ``[B, H, W, C]``: in [0, 1], then ``(x - mean) / std``, in this order.

    ``mean`` and ``std`` are ``[C, 1, 1]`` on the device of the pixels.
    """
    values = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format)
    return values.div_(255).sub_(mean).div_(std)


def memory_format(device: torch.device, channels_last: bool) -> torch.memory_format:
    """How images and weights of four axes lie in memory; a processor keeps the order in which its sums were always."""
    return torch.channels_last if channels_last and device.type == "cuda" else torch.contiguous_format


class Samples(Dataset[Any]):
    """What a loader reads of an :class:`~.datasets.ImageDataset`, to be made a batch of floats by :meth:`finish`.

    Args:
        images: the data set.
        views: crops of each decoded image; a batch has as many times the images that were decoded.
        passes: how often an epoch has each image; every time it is augmented anew.
        resizer: one of :data:`~.decoding.RESIZERS`.
        on_device: let :meth:`finish` resize and flip the crops; the same crops are drawn.
        memory_format: of the batches.
    """

    def __init__(
        self,
        images: ImageDataset,
        *,
        views: int = 1,
        passes: int = 1,
        resizer: str = "pillow",
        on_device: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.images, self.views, self.resizer, self.memory_format = images, views, resizer, memory_format
        self.passes = passes
        own = type(images).__getitem__ is not ImageDataset.__getitem__  # of a data set that makes its samples itself
        native = not own and hasattr(images.transform, "travelling")
        self.taken = None if own else NativeTaken(images.transform) if native else take_apart(images.transform)
        crop = None if self.taken is None else self.taken.crop
        self._device_crop = crop if on_device else None
        if crop is None and (on_device or resizer != "pillow"):
            raise ValueError("expected a random crop and flip as the only augmentation")
        if own and (views > 1 or passes > 1):
            raise ValueError("expected images that make no samples of their own")
        self._read = getattr(images.source, "array", None) if crop is not None else None
        usual = native_collate if native else getattr(images, "collate", default_collate)
        self.collate = self._collate if self._device_crop is not None else usual
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.images) * self.passes

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        if self.taken is None and self.views == self.passes == 1:
            return self.images[index]
        found, decoded = self.images.load(index, self._read)
        epoch = int(self.images._epoch)
        views = [self._view(decoded, (self.images.seed, epoch, index, view)) for view in range(self.views)]
        sample = views[0] if self.views == 1 else views if self._device_crop else stacked(views)
        return sample if self.images.labels is None else (sample, self.images.labels[found])

    def _view(self, decoded: Any, place: Places) -> Any:
        if self.taken is None:
            with sample_seed(*place):
                return self.images.transform(decoded)
        if self._device_crop is None:
            return self.taken.pixels(decoded, place, self.resizer)
        box = self._device_crop.draw(*size_of(decoded), sample_words(*place))
        return region(decoded, box, self.taken.channels), box.flipped

    def _collate(self, samples: list[Any]) -> Any:
        labelled = self.images.labels is not None
        views = [sample[0] if labelled else sample for sample in samples]
        assert self._device_crop is not None
        regions = Regions.gather([v for vs in views for v in vs] if self.views > 1 else views, self._device_crop.size)
        return (regions, torch.tensor([sample[1] for sample in samples])) if labelled else regions

    def finish(self, batch: Any) -> Any:
        """A batch of the loader, on its device, as the data set's own samples stacked: ``[B, C, H, W]``, and labels."""
        if self.taken is None and self.views == 1:
            return batch
        images, labels = batch if self.images.labels is not None else (batch, None)
        if self._device_crop is not None:
            images = resample(Regions(*images), self._device_crop.size)
        elif self.views > 1:
            images = images.flatten(0, 1)
        if self.taken is not None:
            images = self.taken.normalised(images, *self._on(images.device), self.memory_format)
        if labels is None:
            return images
        return images, labels.repeat_interleave(self.views) if self.views > 1 else labels

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._constants:
            assert self.taken is not None
            self._constants[device] = constants(self.taken.statistics, device)
        return self._constants[device]


def constants(statistics: Statistics, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation as :func:`normalised` takes them."""
    mean, std = (torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] for values in statistics)
    return mean, std


class PredictBytes(Dataset[Any]):
    """A :class:`~.datasets.PredictDataset` whose images are uint8 ``[H, W, C]``, zero where they cannot be read."""

    def __init__(self, images: PredictDataset, taken: Taken) -> None:
        self.images, self.taken = images, taken

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        channels, *size = self.images.shape
        try:
            return self.taken.pixels(self.images.load(index), (0, 0, index, 0)), index, ""
        except UnreadableImageError as error:
            return torch.zeros(*size, channels, dtype=torch.uint8), index, str(error)

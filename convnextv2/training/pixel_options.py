"""Options of a run about the pixels of its images: how they are read, and how they are changed in training."""

# option() makes a field

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from convnextv2.data.augmentation import PRESETS, Augmentation, BandAugmentation
from convnextv2.data.decoding import CROPS, MAX_PIXELS, PIXELS, USUAL, Wanted
from convnextv2.data.metadata import numbers_of
from convnextv2.training.recipe import option

PARTS = ("vflip", "turns", "brightness", "contrast", "noise", "band_dropout")
"""Options that are parts of ``augment``, for native images only."""


@dataclass(frozen=True, kw_only=True)
class PixelOptions:
    """Options that :class:`~.options.RunOptions` has."""

    pixels: str | None = option(
        None,
        "photo reads 8 bits a value, native the type and units of the files; auto, the default: native where most of "
        "the images have more than 8 bits, else photo; with --init as the checkpoint's were read",
        PIXELS,
    )
    window: tuple[int, int] | int | None = option(
        None,
        "read scenes (TIFF, .npy, .zarr of any size) by windows of so many pixels, 512 or 384x512: random ones in "
        "training, a grid of them elsewhere; default: whole images",
    )
    bands: str | None = option(None, "bands of native images to take, numbered from 1, as in 4,3,2; default: all")
    no_data: float | None = option(None, "value of native images that is no data, beside NaN and what files declare")
    value_range: tuple[float, float] | None = option(
        None, "least and greatest value that native images can have; default: what is measured"
    )
    augment: str | None = option(
        None, "changes of training images: photo, microscopy, satellite or none; default: photo", tuple(PRESETS)
    )
    crop: str | None = option(
        None, "crops of native images: area, resized, or native, at their own scale; default: by --augment", CROPS
    )
    vflip: float | None = option(None, "probability of a flip upside down; default: by --augment, as those that follow")
    turns: bool | None = option(None, "turn images by random multiples of 90°")
    brightness: float | None = option(None, "largest shift of each band, in four standard deviations of it")
    contrast: float | None = option(None, "largest relative change of each band's distance from its mean")
    noise: float | None = option(None, "largest standard deviation of added noise, in those of the band")
    band_dropout: float | None = option(None, "probability that a band is replaced by its mean")

    def wanted_pixels(self, max_pixels: int, least_side: int | None) -> Wanted:
        """What is wanted of image files."""
        bands = None if self.bands is None else parse_bands(self.bands)
        crop = self.crop or PRESETS[self.augment or "photo"]["crop"]
        pixels = self.pixels or "auto"
        if pixels == "auto" and (self._parts() or self.crop or self.augment not in (None, "photo")):
            pixels = "native"
        window = self.window if isinstance(self.window, tuple) else None
        how: Any = {"crop": crop, "value_range": self.value_range, "window": window}
        return Wanted(max_pixels, least_side, pixels, bands, self.no_data, **how)

    def augmentation(self, wish: Augmentation | None = None) -> BandAugmentation:
        """The changes of training images: ``wish`` with the parts that are asked for, or are of ``augment``."""
        preset = {name: value for name, value in PRESETS[self.augment or "photo"].items() if name != "crop"}
        usual = {} if wish is None else {name: getattr(wish, name) for name in Augmentation.__dataclass_fields__}
        return BandAugmentation(**(usual | preset | self._parts()))

    def _parts(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}

    def check_pixels(self) -> None:
        """Raise ValueError on such options that are out of range, or do not fit each other."""
        wanted = self.wanted_pixels(1, None)
        self.augmentation()
        in_chans = getattr(self, "in_chans", None)
        if wanted.bands is not None and in_chans is not None and len(wanted.bands) != in_chans:
            raise ValueError(
                f"`bands` {wanted.shown_bands} are {len(wanted.bands)}, and `in_chans` is {in_chans}; let them agree"
            )
        if wanted.window is not None and getattr(self, "cache", None) is not None:
            raise ValueError("`cache` keeps whole images, and `window` reads parts anew; leave one of them out")
        given = [*self._parts(), *(["augment"] if self.augment not in (None, "photo") else [])]
        if given and wanted.pixels == "photo":
            raise ValueError(f"`{given[0]}` is of `pixels` native; leave it out with `pixels` photo")
        if self.augment == "none" and (changes := self._parts()):
            raise ValueError(f"`augment` none is no change, and `{min(changes)}` one: leave out either")

    def reads_as(self, metadata: Mapping[str, Any], found: dict[str, Any]) -> bool:
        """Whether mean and standard deviation that stand in a checkpoint's metadata are of the images as they are read
        here; answers to options that are left open go to ``found``.

        Images of more than 8 bits are read with all of them after photographs too, and measured anew.
        """
        from convnextv2.data.reading import as_trained, looks_native  # with torch: not for --help

        own = self.wanted_pixels(MAX_PIXELS, None)
        if metadata.get("pixels") != "native":
            if native := looks_native(getattr(self, "data", ""), own):
                found["pixels"] = "native"
            return not native
        kept = as_trained(replace(USUAL, pixels="auto"), metadata)
        bands = None if kept.bands is None else kept.shown_bands
        found |= {"pixels": "native", "bands": bands, "no_data": kept.no_data, "value_range": kept.value_range}
        if self.augment is None:
            found["crop"] = kept.crop
        return own.pixels != "photo" and own.bands in (None, kept.bands)

    def reading(self, saved: Mapping[str, Any] | None) -> dict[str, Any]:
        """``wanted``, ``mean`` and ``std`` for the data set of a run; of one that is resumed, whose progress is
        ``saved``, as they were."""
        from convnextv2.data.reading import as_trained

        wanted = getattr(self, "wanted", USUAL)
        if saved is None:
            return {"wanted": wanted}
        found: dict[str, Any] = {"wanted": as_trained(wanted, saved)}
        if saved.get("pixels") == "native":
            found |= {"mean": numbers_of(saved, "mean"), "std": numbers_of(saved, "std")}
        return found


@dataclass(frozen=True, kw_only=True)
class CropOptions(PixelOptions):
    """Options of a run that learns from random crops of images."""

    crop_scale: tuple[float, float] | None = option(
        None, "shares of the area to crop; default: 0.2 1 in pre-training, 0.08 1 in fine-tuning (digits: 0.5 1)"
    )
    hflip: float | None = option(None, "probability of a horizontal flip; default: 0.5 (digits: 0)")

    def augmentation(self, wish: Augmentation | None = None) -> BandAugmentation:
        """As of every run; without ``wish`` with these crops and flips."""
        return super().augmentation(wish or Augmentation(self.crop_scale, self.hflip))


def parse_bands(text: str) -> tuple[int, ...]:
    """Band numbers of ``4,3,2``.

    Raises:
        ValueError: if these are none.
    """
    try:
        bands = tuple(int(part) for part in text.split(","))
    except ValueError:
        bands = ()
    return replace(USUAL, bands=bands).bands or ()

"""What values a set of images has: mean, standard deviation, percentiles, histogram and no-data share of each band.

Images are added one at a time, and what was found of parts is merged, so memory does not grow with the set and
processes share the work. Percentiles come from histograms with a bin for every value of 16 bits; float32 falls into
bins by its upper 16 bits, which are 2⁷ between one power of two and the next, so a percentile is right to 0.8 %.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convnextv2.data.bands import bands as in_rows
from convnextv2.data.decoding import UnreadableImageError, Wanted, is_zarr
from convnextv2.data.rasters import Raster
from convnextv2.files import write_json

Ranges = Sequence[tuple[float, float]]
"""Least and greatest value of each band."""
FILE = ".statistics.json"
"""In the folder of the images; hidden, so that no scan takes it for one of them."""
FORMAT = 1
PERCENTILES = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9)
SHOWN_BINS = 64
BINS = 2**16
EXACT = ("uint8", "uint16", "int16")
"""Types of which every value has a bin of its own; others are counted as float32."""


@dataclass
class Moments:
    """Sums of one band, and how often each value occurs.

    ``counts`` is by bin, of the type ``kind``; ``mean`` and ``squares`` (about the mean) are float64.
    """

    kind: str = ""
    count: int = 0
    missing: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: NDArray[Any], missing: int) -> None:
        """Values of the band that are data, and how many others there are."""
        self.missing += missing
        if not values.size:
            return
        kind = str(values.dtype) if str(values.dtype) in EXACT else "float32"
        wide = values.astype(np.float64)
        mean = float(wide.mean())
        other = Moments(kind, values.size, 0, mean, float(np.square(wide - mean).sum()))
        other.low, other.high = float(wide.min()), float(wide.max())
        other.counts = np.bincount(_bins(values, kind), minlength=BINS).astype(np.int64)
        self.merge(other)

    def merge(self, other: Moments) -> None:
        """Take in what was found of other values (Chan, Golub and LeVeque 1983, equation 2.1)."""
        self.missing += other.missing
        if not other.count:
            return
        if self.count and self.kind != other.kind:
            for one in (self, other):
                one._to_floats()
        self.kind = other.kind
        total = self.count + other.count
        apart = other.mean - self.mean
        self.squares += other.squares + apart * apart * (self.count * (other.count / total))
        self.mean += apart * (other.count / total)
        self.count, self.counts = total, self.counts + other.counts
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def _to_floats(self) -> None:
        if self.kind != "float32":
            values = _lower_edges(np.arange(BINS), self.kind).astype(np.float32)
            self.counts = np.bincount(_bins(values, "float32"), self.counts, BINS).astype(np.int64)
            self.kind = "float32"

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @property
    def no_data_share(self) -> float:
        return self.missing / max(1, self.missing + self.count)

    def percentile(self, share: float) -> float:
        """The value that ``share`` per cent lie at or below; the middle of its bin for float32."""
        if not self.count:
            return math.nan
        place = int(np.searchsorted(self.counts.cumsum(), max(1, math.ceil(share / 100 * self.count))))
        edges = _lower_edges(np.array([place, min(place + 1, BINS - 1)]), self.kind).astype(np.float64)
        middle = edges[0] if self.kind in EXACT else edges.mean()
        return float(np.clip(middle, self.low, self.high))

    def histogram(self, bins: int = SHOWN_BINS) -> tuple[list[int], list[float]]:
        """Counts of equal bins between the least and the greatest value, and their edges."""
        if not self.count:
            return [], []
        filled = np.flatnonzero(self.counts)
        values = _lower_edges(filled, self.kind).astype(np.float64).clip(self.low, self.high)
        high = self.high if self.high > self.low else self.low + 1
        counts, edges = np.histogram(values, bins, (self.low, high), weights=self.counts[filled])
        return counts.astype(int).tolist(), edges.tolist()


def _bins(values: NDArray[Any], kind: str) -> NDArray[np.int64]:
    if kind in EXACT:
        return values.astype(np.int64).ravel() - int(np.iinfo(kind).min)
    bits = (values.astype(np.float32).ravel() + np.float32(0)).view(np.uint32)  # no negative zero
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # as unsigned numbers in the order of the values
    return (ordered >> 16).astype(np.int64)


def _lower_edges(bins: NDArray[Any], kind: str) -> NDArray[Any]:
    if kind in EXACT:
        return bins + int(np.iinfo(kind).min)
    ordered = bins.astype(np.uint32) << np.uint32(16)
    bits = np.where(ordered >> 31, ordered ^ np.uint32(1 << 31), ~ordered)
    return bits.astype(np.uint32).view(np.float32)


class BandStatistics:
    """Moments of each band, of images that are added one at a time."""

    def __init__(self, channels: int) -> None:
        self.bands = [Moments() for _ in range(channels)]
        self.images = 0
        self.unreadable: list[tuple[int, str]] = []

    def add(self, image: Raster | NDArray[Any]) -> None:
        """An image ``[H, W, C]``."""
        raster = image if isinstance(image, Raster) else Raster(np.asarray(image))
        self.images += 1
        for rows in in_rows(raster.shape):
            part = raster[rows]
            for number, moments in enumerate(self.bands):
                values = part.values[..., number]
                if part.valid is None:
                    moments.add(values, 0)
                else:
                    valid = part.valid[..., number]
                    moments.add(values[valid], int(valid.size - np.count_nonzero(valid)))

    def merge(self, other: BandStatistics) -> None:
        """Take in what was found of other images."""
        self.images += other.images
        self.unreadable += other.unreadable
        for own, found in zip(self.bands, other.bands, strict=True):
            own.merge(found)

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """As images are normalised: a band without data, or of one value alone, is divided by 1."""
        pairs = ((band.std, 1e-9 * max(abs(band.low), abs(band.high)) if band.count else 0.0) for band in self.bands)
        usable = tuple(std if std > rounding else 1.0 for std, rounding in pairs)
        return tuple(moments.mean for moments in self.bands), usable

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """Least and greatest value of each band; (0, 1) where it has none."""
        return tuple((moments.low, moments.high) if moments.count else (0.0, 1.0) for moments in self.bands)

    def about(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        mean, std = self.mean_std
        found = [
            {
                "low": moments.low if moments.count else None,
                "high": moments.high if moments.count else None,
                "no_data_share": moments.no_data_share,
                "percentiles": {f"{share:g}": moments.percentile(share) for share in PERCENTILES if moments.count},
                "histogram": dict(zip(("counts", "edges"), moments.histogram(), strict=True)),
            }
            for moments in self.bands
        ]
        return {"images": self.images, "mean": list(mean), "std": list(std), "bands": found}


def _measure(load: Callable[[int], Any], numbers: Sequence[int], channels: int) -> BandStatistics:
    found = BandStatistics(channels)
    for number in numbers:
        try:
            found.add(load(number))
        except UnreadableImageError as error:  # noqa: PERF203  # told with the others
            found.unreadable.append((number, str(error)))
    return found


def measure(
    source: Any,
    numbers: Sequence[int],
    channels: int,
    *,
    processes: int = 1,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    shares: int | None = None,
) -> BandStatistics:
    """Statistics of some of the images of a source, in so many processes.

    The images are dealt out in ``shares`` parts that are merged in order, so the numbers depend on how many parts there
    are and not on how many processes.

    Args:
        source: gives decoded images by ``load``; picklable.
        numbers: of the images.
        progress: wraps the parts as they come.
    """
    count = min(len(numbers), shares or max(64, processes))
    parts = [numbers[start::count] for start in range(count)]
    total = BandStatistics(channels)
    if processes <= 1:
        for part in progress(parts):
            total.merge(_measure(source.load, part, channels))
        return total
    from convnextv2.data.loading import process_pool  # with torch

    with process_pool(processes) as pool:
        jobs = [pool.submit(_measure, source.load, part, channels) for part in parts]
        for job in progress(jobs):
            total.merge(job.result())
    return total


def reading_key(wanted: Wanted, channels: int) -> dict[str, Any]:
    """What the values of images depend on beside their files."""
    bands = None if wanted.bands is None else list(wanted.bands)
    return {"channels": channels, "bands": bands, "no_data": wanted.no_data, "pixels": wanted.pixels}


def save_statistics(path: Path, found: BandStatistics, wanted: Wanted, files: Sequence[Path]) -> None:
    """Write ``path``, atomically: what was found, how the images were read, and which files there were."""
    about = {"format": FORMAT, "reading": reading_key(wanted, len(found.bands)), "files": _fingerprint(files)}
    write_json(path, {**about, **found.about()})


def place_of(data: Path) -> Path:
    """Where statistics are kept: in a folder of images, and beside a single scene."""
    return data / FILE if data.is_dir() and not is_zarr(data) else data.with_name(f".{data.name}{FILE}")


def stored_statistics(folder: Path, wanted: Wanted, channels: int, files: Sequence[Path]) -> Mapping[str, Any] | None:
    """What is kept with the images, if it is of these files, read in this way; None otherwise.

    Raises:
        ValueError: if the file is there, and is no such statistics.
    """
    path = place_of(folder)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):  # the images may be those of a list
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as statistics of images; delete it ({error})") from error
    try:
        fits = about["format"] == FORMAT and about["reading"] == reading_key(wanted, channels)
        if not fits or about["files"] != _fingerprint(files):
            return None
        numbers = [*about["mean"], *about["std"], *(about_band["no_data_share"] for about_band in about["bands"])]
        whole = len(about["mean"]) == len(about["std"]) == len(about["bands"]) == channels
        if not whole or not all(math.isfinite(number) for number in numbers) or min(about["std"]) <= 0:
            raise ValueError("numbers are missing or not finite")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is no statistics of images; delete it ({error})") from error
    return dict(about)


def _fingerprint(files: Sequence[Path]) -> list[int]:
    """How many files, and bytes in them: what is added, taken away or written anew shows."""
    size = 0
    for file in files:
        try:
            size += file.stat().st_size
        except OSError:  # noqa: PERF203  # gone since: another set
            size -= 1
    return [len(files), size]

"""Windows of scenes as images: at random in training, on a grid elsewhere, those that are mostly no data left out."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from convnextv2.data.datasets import ImageDataset, PredictDataset
from convnextv2.data.decoding import Size, UnreadableImageError, Wanted, is_zarr
from convnextv2.data.images import to_bytes, why_unusable
from convnextv2.data.rasters import Decoded, Raster
from convnextv2.data.scenes import Scene, is_scene, open_scene
from convnextv2.data.sources import DataError, FileSource, OpenedSource, Part, stratified_split
from convnextv2.data.stored import Box
from convnextv2.data.tar_index import cache_folder
from convnextv2.files import atomic_path

LEAST_DATA = 0.5
"""Share of a window's values that must be data; the others are left out."""
MOSTLY_NO_DATA = f"less than {LEAST_DATA:.0%} of the window is data"
DRAWS = 8
"""Windows that are drawn for a sample until one is mostly data."""
PROBE, PROBES = 256, 64
"""Pixels a side, and a row and column of them, by which it is found where a scene has data."""
MOST_WINDOWS = 2**20
"""Of a scene."""


@dataclass(frozen=True)
class Grid:
    """Windows side by side that cover a scene, evenly spaced, the first and the last at its ends.

    Args:
        size, window: (H, W) in pixels; a side of a smaller scene is one window.
    """

    size: Size
    window: Size

    @property
    def counts(self) -> Size:
        """Windows down and across."""
        return math.ceil(self.size[0] / self.window[0]), math.ceil(self.size[1] / self.window[1])

    def __len__(self) -> int:
        return math.prod(self.counts)

    def box(self, number: int) -> Box:
        """The window of that number, row by row."""
        return self._box(number, lambda free, place, count: round(place * free / (count - 1)) if count > 1 else 0)

    def drawn(self, number: int, rng: np.random.Generator) -> Box:
        """A window at random near to it: of all such windows, each place of the scene is as likely as any other."""

        def start(free: int, place: int, count: int) -> int:
            return int(rng.integers(place * (free + 1) // count, max(1, (place + 1) * (free + 1) // count)))

        return self._box(number, start)

    def _box(self, number: int, start: Callable[[int, int, int], int]) -> Box:
        places, starts, ends = divmod(number, self.counts[1]), list[int](), list[int]()
        for whole, side, place, count in zip(self.size, self.window, places, self.counts, strict=True):
            taken = min(side, whole)
            starts.append(start(whole - taken, place, count))
            ends.append(starts[-1] + taken)
        return starts[0], starts[1], ends[0], ends[1]


@dataclass(frozen=True, eq=False)
class WindowSource:
    """The windows of scenes, by number: of one scene after the other, row by row.

    Args:
        scenes: files.
        grids: of each.
        chosen: numbers of the windows of each that are images; None for all.
        exact: whether :meth:`load` refuses a window that is mostly no data.
        files: all scenes of the set that these are taken from; these by default.
    """

    scenes: Sequence[Path]
    in_chans: int
    wanted: Wanted
    grids: Sequence[Grid]
    chosen: Sequence[NDArray[np.int64] | None]
    exact: bool = False
    files: Sequence[Path] = ()
    _ends: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = [len(grid if some is None else some) for grid, some in zip(self.grids, self.chosen, strict=True)]
        object.__setattr__(self, "_ends", np.cumsum(counts, dtype=np.int64))
        object.__setattr__(self, "files", self.files or self.scenes)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def counts(self) -> list[int]:
        """Windows of each scene."""
        return np.diff(self._ends, prepend=0).tolist()

    def scene_of(self, index: int) -> int:
        """Number of the scene that a window is of."""
        return int(np.searchsorted(self._ends, index, side="right"))

    def box(self, index: int) -> Box:
        """Where the window lies in its scene."""
        scene, number = self._place(index)
        return self.grids[scene].box(number)

    def name(self, index: int) -> str:
        """Its scene, and the pixel in its upper left corner."""
        top, left, *_ = self.box(index)
        return f"{self.scenes[self.scene_of(index)]}[x={left},y={top}]"

    def load(self, index: int) -> Decoded:
        """The window of the grid; UnreadableImageError if it cannot be decoded, or is mostly no data and ``exact``."""
        found = self._scene(self.scene_of(index)).read(self.box(index))
        if self.exact and data_share(found) < LEAST_DATA:
            raise UnreadableImageError(MOSTLY_NO_DATA)
        return self._decoded(found)

    def draw(self, index: int, words: Sequence[int]) -> Decoded:
        """A window near to the one of that number, at random by ``words``, mostly of data; the one that :meth:`load`
        gives after :data:`DRAWS` vain ones, and where the file is damaged."""
        scene, number = self._place(index)
        opened, rng = self._scene(scene), np.random.default_rng([*words, index])
        for _ in range(DRAWS):
            try:
                found = opened.read(self.grids[scene].drawn(number, rng))
            except UnreadableImageError:  # told where it is the grid's own window
                break
            if data_share(found) >= LEAST_DATA:
                return self._decoded(found)
        return self.load(index)

    def of_scenes(self, numbers: Sequence[int]) -> WindowSource:
        """The windows of some of the scenes, as if there were no others; ``files`` are theirs."""
        some: dict[str, Any] = {
            name: [getattr(self, name)[number] for number in numbers] for name in ("scenes", "grids", "chosen")
        }
        return replace(self, **some, files=())

    def _place(self, index: int) -> tuple[int, int]:
        scene = self.scene_of(index)
        number = index - (int(self._ends[scene - 1]) if scene else 0)
        some = self.chosen[scene]
        return scene, number if some is None else int(some[number])

    def _scene(self, number: int) -> Scene:
        found = open_scene(self.scenes[number], self.in_chans, self.wanted)
        if found.size != self.grids[number].size:
            raise UnreadableImageError("has another size than when the run started")
        return found

    def _decoded(self, raster: Raster) -> Decoded:
        return as_wanted(raster, self.in_chans, self.wanted)


def as_wanted(raster: Raster, in_chans: int, wanted: Wanted) -> Decoded:
    """A part of a scene as a source gives it: where photographs are wanted an RGB image, of 1 or 3 channels."""
    if wanted.native:
        return raster
    if in_chans not in (1, 3):
        raise UnreadableImageError("`pixels` photo with `window` is of 1 or 3 channels")
    pixels = to_bytes(raster.values)
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).convert("RGB")


def data_share(raster: Raster) -> float:
    """Of the values of a raster that are data."""
    return 1.0 if raster.valid is None else float(raster.valid.mean())


def windows_of(images: FileSource, exact: bool = False) -> tuple[WindowSource, list[str]]:
    """The windows of image files, and for each file the reason why it has none, or nothing.

    Args:
        exact: take all of the grid, and let :meth:`WindowSource.load` say which are mostly no data. Without, those are
            left out whose middle is.
    """
    window = images.wanted.window
    assert window is not None

    def look(path: Path) -> tuple[Grid, NDArray[np.int64] | None, str]:
        grid = Grid((0, 0), window)
        try:
            scene = open_scene(path, images.in_chans, images.wanted)
            grid = Grid(scene.size, window)
            if len(grid) > MOST_WINDOWS:
                return grid, None, f"has {len(grid)} windows, more than {MOST_WINDOWS}; choose a larger `window`"
            some = None if exact or not scene.may_lack_data else _with_data(path, scene, grid)
        except UnreadableImageError as error:
            return grid, None, str(error)
        return grid, some, "" if some is None or len(some) else "has no window that is mostly data"

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        grids, chosen, reasons = zip(*pool.map(look, images.paths), strict=True)
    source = WindowSource(images.paths, images.in_chans, images.wanted, grids, chosen, exact)
    return source.of_scenes([number for number, reason in enumerate(reasons) if not reason]), list(reasons)


def _with_data(path: Path, scene: Scene, grid: Grid) -> NDArray[np.int64]:
    """Numbers of the windows of whose middle most is data; kept in the user's cache, for a file that is the same.

    Of more than :data:`PROBES` windows a row or column, neighbours share a middle.
    """
    status = path.stat()
    about = f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0{grid}\0{scene.in_chans}\0{scene.wanted}"
    place = cache_folder("scenes") / f"{hashlib.sha256(os.fsencode(about)).hexdigest()}.npy"
    kept = not is_zarr(path)  # whose folder does not tell when a chunk changes
    if kept and (known := _read(place, len(grid))) is not None:
        return np.flatnonzero(known)
    down, across = (min(count, PROBES) for count in grid.counts)
    probed = np.array(
        [[_has_data(scene, ((r + 0.5) / down, (c + 0.5) / across)) for c in range(across)] for r in range(down)]
    )
    rows, columns = (np.arange(n) * min(n, PROBES) // n for n in grid.counts)
    found = probed[np.ix_(rows, columns)].ravel()
    if kept:
        with (
            contextlib.suppress(OSError),
            atomic_path(place) as temporary,
        ):  # without a cache the next start looks again
            np.save(temporary, found)
    return np.flatnonzero(found)


def _has_data(scene: Scene, middle: tuple[float, float]) -> bool:
    """Whether most is data of what is decoded together in the middle there; True where it cannot be decoded, which is
    told when it is read."""
    starts, ends = [], []
    for whole, block, share in zip(scene.size, scene.stored.block, middle, strict=True):
        centre = int(share * whole)
        first = centre // block * block
        last = min(first + block, whole)
        starts.append(max(first, min(centre - PROBE // 2, last - PROBE)))
        ends.append(min(starts[-1] + PROBE, last))
    try:
        return data_share(scene.read((starts[0], starts[1], ends[0], ends[1]))) >= LEAST_DATA
    except UnreadableImageError:
        return True


def _read(place: Path, count: int) -> NDArray[np.bool_] | None:
    """What was kept; None where that is missing or damaged."""
    try:
        found = np.load(place, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.dtype == np.bool_ and found.shape == (count,) else None


@dataclass(frozen=True)
class WindowedSource(OpenedSource):
    """Windows instead of whole images: a random split is one of the scenes, so that no window lies in both parts."""

    def split(self, val_fraction: float, seed: int) -> tuple[Part, Part]:
        source, labels = self.train.images, self.train.labels
        if self.val is not None or labels is None or not isinstance(source, WindowSource):
            return super().split(val_fraction, seed)
        scenes = [labels[first] for first in np.cumsum([0, *source.counts[:-1]])]
        train, val = (
            Part(part, _repeated(part, [scenes[number] for number in numbers]))
            for numbers in stratified_split(scenes, val_fraction, seed)
            for part in [replace(source.of_scenes(numbers), files=source.scenes)]
        )
        return replace(train, skipped=self.train.skipped), val


def _repeated(source: WindowSource, labels: Sequence[int]) -> list[int]:
    """Labels of windows, from those of their scenes."""
    return np.repeat(np.asarray(labels, np.int64), source.counts).tolist()


def windowed(opened: OpenedSource, wanted: Wanted) -> OpenedSource:
    """A source by windows of its files, where that is wanted.

    Raises:
        ValueError: if it is one of no files. DataError: if there is no window that is mostly data.
    """
    if wanted.window is None:
        return opened
    train, val = (None if part is None else _part(part, opened.description) for part in (opened.train, opened.val))
    assert train is not None
    height, width = wanted.window
    about = f"{opened.description}, windows of {height}×{width} pixels"
    return WindowedSource(about, train, val, opened.classes, opened.hold_out, opened.statistics)


def _part(part: Part, what: str) -> Part:
    if not isinstance(part.images, FileSource):
        raise ValueError(f"{what}: `window` is of image files; leave it out")
    source, reasons = windows_of(part.images)
    skipped = [(path, reason) for path, reason in zip(part.images.paths, reasons, strict=True) if reason]
    if not len(source):
        first = f"; first: {skipped[0][0]} ({skipped[0][1]})" if skipped else ""
        raise DataError(f"{what}: looked for windows that are mostly data and found none{first}")
    labels = None
    if part.labels is not None:
        kept = [label for label, reason in zip(part.labels, reasons, strict=True) if not reason]
        labels = _repeated(source, kept)
    return Part(source, labels, [*part.skipped, *skipped])


class WindowDataset(ImageDataset):
    """Random windows: sample ``index`` of an epoch is drawn by (seed, epoch, index). Its examples are of the grid."""

    def load(self, index: int, read: Callable[[int], Any] | None = None) -> tuple[int, Any]:
        words = self.seed, int(self._epoch), index // len(self)
        return super().load(index, read or partial(self.source.draw, words=words))  # type: ignore[attr-defined]

    def examples(self, count: int) -> Tensor:
        fixed = ImageDataset(self.part, self.transform, self.plain_transform, self.statistics, what=self.what)
        return fixed.examples(count)


def training_set(part: Part) -> type[ImageDataset]:
    """The data set that suits the images to train on."""
    return WindowDataset if isinstance(part.images, WindowSource) else ImageDataset


class WindowPredictDataset(PredictDataset):
    """The windows of the grids of scenes, as images to predict; ``files`` are what they are called.

    ``windows`` are where they lie: its ``scene_of`` and ``box`` say in which scene, and where.
    """

    windows: WindowSource

    def load(self, index: int) -> Any:
        return self.windows.load(index)


def predict_dataset(
    files: Sequence[Path],
    transform: Any,
    shape: tuple[int, int, int],
    skipped: Sequence[tuple[Path, str]],
    wanted: Wanted,
) -> PredictDataset:
    """Images to predict, or their windows where these are wanted.

    Raises:
        DataError: if no file can be read by window.
    """
    if wanted.window is None:
        return PredictDataset(files, transform, shape, skipped, wanted)
    source, reasons = windows_of(FileSource(files, shape[0], wanted), exact=True)
    without = [(path, reason) for path, reason in zip(files, reasons, strict=True) if reason]
    if not len(source):
        raise DataError(f"{without[0][0]}: {without[0][1]}")
    names = [Path(source.name(number)) for number in range(len(source))]
    found = WindowPredictDataset(names, transform, shape, [*skipped, *without], wanted)
    found.windows = source
    return found


class SceneKind:
    """One scene: a file, or a folder that is a zarr array."""

    expects = "one scene (TIFF, .npy or .zarr)"

    def claims(self, spec: str) -> bool:
        return is_scene(Path(spec))

    def open(self, spec: str, *, in_chans: int, img_size: Size, labelled: bool, wanted: Wanted) -> OpenedSource:
        """As :func:`~.opening.open_source`."""
        if wanted.window is None:
            raise DataError(f"{spec}: one image, expected a folder of them; `window` reads a scene in parts")
        if labelled:
            raise DataError(f"{spec}: has no labels; expected a folder of class folders")
        if reason := why_unusable(Path(spec), in_chans, False, wanted):
            raise DataError(f"{spec}: {reason}")
        return OpenedSource(spec, Part(FileSource([Path(spec)], in_chans, wanted)))


SOURCE_KIND = SceneKind()

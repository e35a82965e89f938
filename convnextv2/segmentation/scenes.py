"""Classes of scenes: what is too large to be held is read by window, and its classes are written as TIFF files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from convnextv2.data.decoding import Size, Wanted
from convnextv2.data.scenes import Scene, is_scene, open_scene
from convnextv2.data.tiff import is_tiff, need
from convnextv2.data.windows import as_wanted
from convnextv2.files import atomic_path
from convnextv2.segmentation.masks import Classes
from convnextv2.segmentation.transforms import pixels

TILE = 512
GEOREFERENCE = (33550, 33922, 34264, 34735, 34736, 34737)
"""GeoTIFF's tags: where an image lies and in which coordinates."""


def large_scene(path: Path, in_chans: int, wanted: Wanted, window: Size) -> Scene | None:
    """An image of more than ``max_pixels``, opened to be read by window; None if it is no larger, or of no such format.

    Raises:
        UnreadableImageError: if it cannot be read so.
    """
    if not is_scene(path) or path.is_dir():
        return None
    scene = open_scene(path, in_chans, replace(wanted, window=window))
    return scene if scene.size[0] * scene.size[1] > wanted.max_pixels else None


class ScenePixels:
    """A scene as windows take it: the pixels of a part are read when it is asked for."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.shape = (*scene.size, scene.in_chans)

    def __getitem__(self, part: tuple[slice, slice]) -> Tensor:
        (top, bottom, _), (left, right, _) = (s.indices(n) for s, n in zip(part, self.scene.size, strict=True))
        found = self.scene.read((top, left, bottom, right))
        return pixels(as_wanted(found, self.scene.in_chans, self.scene.wanted), self.scene.in_chans)


def write_classes(
    path: Path,
    scene: Scene,
    place: Path,
    classes: Classes,
    run: Callable[[ScenePixels, Callable[[Tensor], object]], None],
) -> None:
    """Write the classes of a scene as a tiled, compressed TIFF, with the georeference of one; held are some rows.

    Args:
        path: of the scene.
        place: of the TIFF.
        classes: what its values are.
        run: gives the rows of its numbers of classes, uint8 ``[h, W]``, to what is its second argument.

    Raises:
        UnreadableImageError: if a part of the scene cannot be decoded; nothing is written.
        OSError: if it cannot be written; beside it a byte a pixel is needed for as long as it takes.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=place.parent) as numbers:

        def take(rows: Tensor) -> None:
            try:
                numbers.write(rows.numpy().tobytes())
                numbers.flush()
            except OSError as error:  # of a file without a name
                raise OSError(error.errno, error.strerror, str(place.parent)) from error

        run(ScenePixels(scene), take)
        numbers.seek(0)
        with atomic_path(place) as temporary:
            _write_mask(temporary, _bands(numbers, scene.size), scene.size, classes, _georeference(path))


def _bands(file: Any, size: Size) -> Iterator[NDArray[np.uint8]]:
    """``[h, W]`` numbers of classes, as many rows at a time as a tile has."""
    for top in range(0, size[0], TILE):
        height = min(TILE, size[0] - top)
        yield np.frombuffer(file.read(height * size[1]), np.uint8).reshape(height, size[1])


def _write_mask(path: Path, rows: Iterable[NDArray[np.uint8]], size: Size, classes: Classes, tags: list[Any]) -> None:
    dtype = classes.decode(np.zeros((1, 1), np.uint8)).dtype

    def tiles() -> Iterator[NDArray[Any]]:
        for band in rows:
            values = classes.decode(band)
            for left in range(0, size[1], TILE):
                part = values[:, left : left + TILE]
                yield np.pad(part, ((0, TILE - part.shape[0]), (0, TILE - part.shape[1])))

    how: dict[str, Any] = {"photometric": "minisblack"}
    if dtype == np.uint8:
        how = {"photometric": "palette", "colormap": classes.colours().T.astype(np.uint16) * 257}
    need("tifffile", "a mask of a scene").imwrite(
        path, tiles(), shape=size, dtype=dtype, tile=(TILE, TILE), compression="zlib", extratags=tags, **how
    )


def _georeference(path: Path) -> list[tuple[int, int, int, Any, bool]]:
    """The tags of a TIFF that say where it lies, for another one of the same size."""
    with path.open("rb") as file:
        if not is_tiff(file.read(8)):
            return []
    with need("tifffile", "a TIFF").TiffFile(path) as file:
        found = [file.pages[0].tags.get(code) for code in GEOREFERENCE]
        return [(tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in found if tag is not None]

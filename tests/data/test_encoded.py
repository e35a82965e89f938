"""Image files in memory are read as those on disk are, damaged ones too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image
from test_native_reading import twelve_bits, write

from convnextv2.data.decoding import UnreadableImageError, Wanted
from convnextv2.data.encoded import Encoded
from convnextv2.data.images import load_image, why_unusable
from convnextv2.data.native import band_count, is_deep
from convnextv2.data.rasters import Raster


def georeferenced(path: Path) -> Path:
    """A TIFF that rasterio is asked for, with a mask band."""
    about = {"driver": "GTiff", "height": 96, "width": 96, "count": 3, "dtype": "uint16"}
    values = np.moveaxis(twelve_bits(3), -1, 0)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, "w", transform=rasterio.transform.from_origin(10, 50, 1, 1), crs="EPSG:4326", **about
        ) as file,
    ):
        file.write(values)
        file.write_mask(values[0] > 100)
    return path


def made(kind: str, folder: Path) -> Path:
    rng = np.random.default_rng(0)
    path = folder / f"image.{kind.rpartition(' ')[2]}"
    if kind == "georeferenced tif":
        return georeferenced(path)
    if kind in ("tif", "npy", "npz", "dcm"):
        return write(kind, folder / "image", twelve_bits(3 if kind != "dcm" else 1))
    if kind == "deep png":
        return write("png", folder / "image", twelve_bits(3))
    image = Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8))
    if kind == "uncompressed tif":
        tifffile.imwrite(path, np.asarray(image), photometric="rgb")
    elif kind == "turned jpg":
        exif = Image.Exif()
        exif[274] = 6
        image.save(path, exif=exif)
    else:
        image.save(path)
    return path


def values_of(file: Path | Encoded, wanted: Wanted) -> Any:
    try:
        image = load_image(file, 3, wanted)
    except UnreadableImageError:
        return None
    return image.floats() if isinstance(image, Raster) else np.asarray(image)


KINDS = ["png", "jpg", "turned jpg", "webp", "gif", "jp2", "bmp", "uncompressed tif", "tif", "georeferenced tif",
         "npy", "npz", "dcm", "deep png"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pixels", ["photo", "native"])
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_the_same_as_from_disk(tmp_path: Path, kind: str, pixels: str) -> None:
    path, wanted = made(kind, tmp_path), Wanted(pixels=pixels, max_pixels=2000 if kind == "jpg" else 2**20)
    memory = Encoded(path.read_bytes(), path.name)
    assert (is_deep(memory), band_count(memory)) == (is_deep(path), band_count(path))
    reason = why_unusable(path, 3, True, wanted)
    assert why_unusable(memory, 3, True, wanted) == reason
    if reason is None:
        np.testing.assert_array_equal(values_of(path, wanted), values_of(memory, wanted))
    else:
        assert pixels == "photo"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6])
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_what_is_cut_is_unreadable_or_read_the_same(tmp_path: Path, kind: str, share: float) -> None:
    path = made(kind, tmp_path)
    content = path.read_bytes()[: int(share * path.stat().st_size)]
    path.write_bytes(content)
    for wanted in (Wanted(pixels="photo"), Wanted(pixels="native")):
        found = [values_of(file, wanted) for file in (path, Encoded(content, path.name))]
        np.testing.assert_array_equal(*found)
        if not share:
            assert found[0] is None

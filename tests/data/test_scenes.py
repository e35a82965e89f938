"""Windows of scenes are the same pixels as those of the whole image, and nothing else of it is decoded."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
import zarr
from PIL import Image
from scene_helpers import NO_DATA, pixels, write_large, write_tiff

from convnextv2.data.decoding import UnreadableImageError, Wanted
from convnextv2.data.images import load_image, why_unusable
from convnextv2.data.scenes import Scene, open_scene, scene_bands

NATIVE = Wanted(pixels="native", window=(64, 48))
SIZE = 150, 190
BOXES = [(0, 0, 64, 48), (86, 142, 150, 190), (31, 15, 95, 63), (0, 0, 150, 190), (149, 189, 150, 190)]


def scene(path: Path, in_chans: int, **wanted: Any) -> Scene:
    return open_scene(path, in_chans, Wanted(**{"pixels": "native", "window": (64, 48), **wanted}))


def check(path: Path, values: np.ndarray, valid: np.ndarray | None = None) -> None:
    """Each window of a file is that part of what it holds."""
    opened = scene(path, values.shape[2])
    assert opened.size == values.shape[:2]
    for top, left, bottom, right in BOXES:
        found, part = opened.read((top, left, bottom, right)), np.s_[top:bottom, left:right]
        here = np.ones(values[part].shape, bool) if valid is None else valid[part]
        np.testing.assert_array_equal(found.values[here], values[part][here])
        assert found.values.dtype == values.dtype.newbyteorder("=")
        np.testing.assert_array_equal(np.ones(here.shape, bool) if found.valid is None else found.valid, here)


LAYOUTS: dict[str, dict[str, Any]] = {
    "tiles": {"tile": (32, 48)},
    "strips": {"rowsperstrip": 7},
    "strips as they are": {"rowsperstrip": 7, "compression": None},
    "tiles as they are": {"tile": (32, 48), "compression": None},
    "planes": {"tile": (32, 48), "planarconfig": "separate"},
    "planes as they are": {"planarconfig": "separate", "compression": None},
    "one strip as it is": {"rowsperstrip": SIZE[0], "compression": None, "byteorder": ">"},
    "predictor": {"tile": (32, 48), "predictor": 2, "compression": "zstd", "bigtiff": True, "byteorder": ">"},
}


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_of_tiffs_are_parts_of_the_whole(layout, dtype, tmp_path):
    values = pixels(*SIZE, 4, dtype=dtype)
    how = {**LAYOUTS[layout], **({"predictor": 3} if (layout, dtype) == ("predictor", "f4") else {})}
    path = write_tiff(tmp_path / "a.tif", values, **how)
    check(path, values)
    np.testing.assert_array_equal(load_image(path, 4, Wanted(pixels="native")).values, values)
    two = scene(path, 2, bands=(4, 2)).read((31, 15, 95, 63))
    np.testing.assert_array_equal(two.values, values[31:95, 15:63, [3, 1]])


def test_jpeg_tiles_and_pages_as_bands(tmp_path):
    values = np.full((*SIZE, 3), 99, np.uint8)
    path = tmp_path / "jpeg.tif"
    tifffile.imwrite(path, values, tile=(32, 48), compression="jpeg", photometric="rgb")
    whole = load_image(path, 3, Wanted(pixels="native")).values
    check(path, whole)
    bands = pixels(*SIZE, 3)
    with tifffile.TiffWriter(tmp_path / "pages.tif") as writer:
        for band in range(3):
            writer.write(bands[..., band], photometric="minisblack", tile=(32, 48), compression="zlib")
    check(tmp_path / "pages.tif", bands)


@pytest.mark.parametrize("by", ["tifffile", "rasterio"])
def test_what_is_no_data_is_none_in_a_window(by, tmp_path):
    values = pixels(*SIZE, 3)
    values[:40, :60] = NO_DATA
    more = {"extratags": []} if by == "tifffile" else {}
    path = write_tiff(tmp_path / "a.tif", values, NO_DATA, tile=(32, 48), **more)
    if by == "rasterio":
        path = tmp_path / "geo.tif"
        how = {"driver": "GTiff", "height": SIZE[0], "width": SIZE[1], "count": 3, "dtype": "uint16", "nodata": NO_DATA}
        how |= {"crs": "EPSG:32633", "transform": rasterio.transform.from_origin(5e5, 4e6, 10, 10)}
        with rasterio.open(path, "w", **how, tiled=True, blockxsize=48, blockysize=32) as image:
            image.write(np.moveaxis(values, -1, 0))
    check(path, values, values != NO_DATA)
    assert scene(path, 3).may_lack_data


def test_mask_bands_count_where_rasterio_reads(tmp_path):
    values, valid = pixels(*SIZE, 2), np.random.default_rng(0).random(SIZE) < 0.5
    how = {"driver": "GTiff", "height": SIZE[0], "width": SIZE[1], "count": 2, "dtype": "uint16"}
    place = rasterio.transform.from_origin(5e5, 4e6, 10, 10)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(tmp_path / "a.tif", "w", **how, crs="EPSG:32633", transform=place) as image,
    ):
        image.write(np.moveaxis(values, -1, 0))
        image.write_mask(valid)
    check(tmp_path / "a.tif", values, np.repeat(valid[..., None], 2, -1))


def test_an_alpha_band_says_what_is_data(tmp_path):
    values = pixels(*SIZE, 4, dtype="u1")
    values[..., 3] = np.where(np.random.default_rng(1).random(SIZE) < 0.5, 255, 0)
    write_tiff(tmp_path / "a.tif", values, tile=(32, 48), photometric="rgb", extrasamples=["unassalpha"])
    check(tmp_path / "a.tif", values[..., :3], np.repeat(values[..., 3:] > 0, 3, -1))


def test_tiles_that_are_left_out_are_no_data(tmp_path):
    path = write_tiff(tmp_path / "a.tif", pixels(*SIZE, 2), 0, tile=(32, 48))
    with tifffile.TiffFile(path, mode="r+b") as file:
        counts = file.pages[0].tags["TileByteCounts"]
        counts.overwrite([0, *counts.value[1:]])
    found = scene(path, 2).read((0, 0, 64, 96))
    assert found.valid is not None
    assert not found.valid[:32, :48].any()
    assert found.valid[32:].mean() > 0.99


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_windows_of_arrays(order, first, tmp_path):
    values = pixels(*SIZE, 5, dtype="f4")
    values[3, 5, 2] = np.nan
    stored = np.moveaxis(values, -1, 0) if first else values
    np.save(tmp_path / "a.npy", np.asarray(stored, order=order))
    check(tmp_path / "a.npy", values, np.isfinite(values))
    np.save(tmp_path / "gray.npy", np.asarray(values[..., 0], order=order))
    check(tmp_path / "gray.npy", values[..., :1])


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("first", [False, True])
def test_windows_of_zarr_arrays(first, version, tmp_path):
    values = pixels(*SIZE, 5)
    values[:30] = NO_DATA
    stored, chunks = (np.moveaxis(values, -1, 0), (2, 40, 50)) if first else (values, (40, 50, 2))
    path = tmp_path / "a.zarr"
    array = zarr.create_array(path, shape=stored.shape, chunks=chunks, dtype="u2", zarr_format=version)
    array[:] = stored
    array.attrs["_FillValue"] = NO_DATA
    check(path, values, values != NO_DATA)
    assert scene_bands(path) == 5
    zarr.create_array(tmp_path / "gray.zarr", shape=SIZE, chunks=(40, 50), dtype="u2", zarr_format=version)[:] = 7
    check(tmp_path / "gray.zarr", np.full((*SIZE, 1), 7, np.uint16))


def test_tiles_beside_a_window_are_not_decoded(tmp_path):
    """All tiles but the four of a window are overwritten with what no decoder takes."""
    path = write_tiff(tmp_path / "a.tif", pixels(*SIZE, 2), tile=(32, 48))
    whole = tifffile.imread(path)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    wanted = {row * 4 + column for row in (1, 2) for column in (1, 2)}
    with path.open("r+b") as file:
        for number, (offset, count) in enumerate(places):
            if number not in wanted:
                file.seek(offset)
                file.write(b"\xff" * count)
    np.testing.assert_array_equal(scene(path, 2).read((40, 50, 96, 144)).values, whole[40:96, 50:144])
    with pytest.raises(UnreadableImageError, match="cannot be decoded there"):
        scene(path, 2).read((0, 0, 64, 48))


MEMORY = """
import sys
from pathlib import Path
from convnextv2.data.decoding import Wanted
from convnextv2.data.sources import FileSource
from convnextv2.data.windows import windows_of

def mebibytes(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) / 1024

path = Path(sys.argv[1])
source, _ = windows_of(FileSource([path], 4, Wanted(pixels="native", window=(224, 224))))
source.load(0)
before = mebibytes("VmRSS")
for number in range(0, len(source), 20):
    source.draw(number, (0, 0))
print(len(source), mebibytes("VmHWM") - min(before, mebibytes("VmHWM")), mebibytes("VmHWM"))
"""


@pytest.mark.slow
def test_the_memory_of_a_scene_is_that_of_windows(tmp_path):
    side, bands = 6000, 4
    path = write_large(tmp_path / "large.tif", side, bands)
    done = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True, timeout=300)
    count, more, _ = map(float, done.stdout.split())
    assert count == 27**2
    assert more < 0.5 * side * side * bands * 2 / 2**20, "MiB, of 275 that the whole has"


REFUSED = {
    "strip": r"strips of 5000×3000 pixels take 86 MiB each; .*gdal_translate -co TILED=YES",
    "jpg": r"is no TIFF, \.npy or \.zarr",
    "cut": r"truncated, \d+ of \d+ bytes",
    "cut strips": r"claims \d+ bytes of a file of \d+",
    "turned": "its orientation is 6",
    "group": r"a group of zarr arrays \(0\); name one",
    "chunks": r"chunks of \(5000, 3000, 3\) take 86 MiB each",
    "objects": "are no real numbers",
    "bands": "has 3 band",
    "window": "more than `max_pixels`",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_by_window_is_refused_in_a_line(what, tmp_path):
    path, bands, wanted = tmp_path / "a.tif", 3, NATIVE
    flat = np.zeros((3000, 5000, 3), np.uint16)
    if what == "strip":
        write_tiff(path, flat, rowsperstrip=3000)
    elif what == "jpg":
        Image.new("RGB", (99, 99)).save(path := tmp_path / "a.jpg")
    elif what in ("cut", "cut strips"):
        more = {"tile": (32, 48)} if what == "cut" else {"compression": None}
        write_tiff(path, pixels(*SIZE, 3), **more)
        os.truncate(path, path.stat().st_size // 2)
    elif what == "turned":
        tifffile.imwrite(path, pixels(*SIZE, 3), photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    elif what in ("group", "chunks"):
        path = tmp_path / "a.zarr"
        if what == "group":
            zarr.create_array(path / "0", shape=SIZE, chunks=(40, 50), dtype="u2")
            zarr.open_group(path, mode="a")
        else:
            zarr.create_array(path, shape=(5000, 3000, 3), chunks=(5000, 3000, 3), dtype="u2")
    elif what == "objects":
        np.save(path := tmp_path / "a.npy", np.zeros((*SIZE, 3), "c8"))
    else:
        write_tiff(path, pixels(*SIZE, 3), tile=(32, 48))
        bands = 4 if what == "bands" else 3
        wanted = Wanted(max_pixels=63 * 48, pixels="native", window=(64, 48)) if what == "window" else NATIVE
    reason = why_unusable(path, bands, True, wanted)
    assert reason is not None
    assert re.search(REFUSED[what], reason), reason
    assert "\n" not in reason


def test_an_image_that_is_too_large_is_told_how_it_is_read(tmp_path):
    path = write_tiff(tmp_path / "a.tif", pixels(*SIZE, 3), tile=(32, 48))
    reason = why_unusable(path, 3, False, Wanted(max_pixels=1000, pixels="native"))
    assert "`window` reads a TIFF, .npy or .zarr in parts" in str(reason)
    assert why_unusable(path, 3, True, Wanted(max_pixels=10_000, pixels="native", window=(64, 48))) is None

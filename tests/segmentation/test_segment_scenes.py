"""fcmae segment predict on scenes: what is larger than --max-pixels is read by window, and gives the same classes."""

from __future__ import annotations

import errno
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image
from rasterio.transform import Affine
from test_segment_script import CPU, make_checkpoint

from convnextv2.data.scenes import Scene

HEIGHT, WIDTH = 530, 700
TRANSFORM = Affine(0.5, 0, 300_000, 0, -0.5, 5_000_000)


def scene(path: Path, bands: int = 3, dtype: str = "uint8", seed: int = 0) -> Path:
    """Smooth noise, georeferenced, in tiles of 256."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, np.iinfo(dtype).max, (bands, 9, 11)).astype(dtype)
    values = np.repeat(np.repeat(coarse, 64, 1), 64, 2)[:, :HEIGHT, :WIDTH]
    size = {"height": HEIGHT, "width": WIDTH, "count": bands, "dtype": dtype, "crs": "EPSG:32633"}
    tiles = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    with rasterio.open(path, "w", driver="GTiff", transform=TRANSFORM, **size, **tiles) as file:
        file.write(values)
    return path


@pytest.mark.parametrize(("bands", "dtype", "values"), [(3, "uint8", (0, 7, 255)), (6, "uint16", (0, 7, 1000))])
def test_a_scene_has_the_classes_of_the_whole_image(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bands: int, dtype: str, values: Any
) -> None:
    native = {} if bands == 3 else {"pixels": "native", "mean": [3e4] * 6, "std": [2e4] * 6}
    path = make_checkpoint(tmp_path / "net.safetensors", bands, values, ignored=9, **native)
    image = scene(tmp_path / "a.tif", bands, dtype)
    whole = script("segment", "predict", path, image, "--output", tmp_path / "whole", "--window", 64, *CPU)
    assert whole.out == f"1 images segmented, 0 unreadable: {tmp_path / 'whole'}\n", whole.err
    read = list[tuple[int, int]]()

    def watched(self: Scene, box: Any) -> Any:
        read.append((box[2] - box[0], box[3] - box[1]))
        return original(self, box)

    original = Scene.read
    monkeypatch.setattr(Scene, "read", watched)
    parts = script(
        "segment", "predict", path, image, "--output", tmp_path / "parts", "--window", 64, "--max-pixels", 100_000, *CPU
    )
    assert parts.out == f"1 images segmented, 0 unreadable: {tmp_path / 'parts'}\n", parts.err
    assert set(read) == {(64, 64)}
    assert [file.relative_to(tmp_path / "parts") for file in (tmp_path / "parts").rglob("*.*")] == [Path("masks/a.tif")]
    expected = np.asarray(Image.open(tmp_path / "whole" / "masks" / "a.png"))
    with rasterio.open(tmp_path / "parts" / "masks" / "a.tif") as found:
        assert (found.crs.to_epsg(), found.transform) == (32633, TRANSFORM)
        assert found.profile["tiled"]
        classes = found.read(1)
        if dtype == "uint8":
            assert found.colormap(1)[7][:3] == (128, 0, 0)
    assert set(np.unique(classes)) <= set(values)
    assert len(np.unique(classes)) > 1
    assert (classes != expected).mean() < 0.001  # rounding may turn the nearest decisions


def test_what_cannot_be_read_by_window_is_told(script: Any, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "net.safetensors")
    image = scene(tmp_path / "damaged.tif")
    data = bytearray(image.read_bytes())
    with tifffile.TiffFile(image) as file:
        start, count = file.pages[0].dataoffsets[4], file.pages[0].databytecounts[4]
    data[start : start + count] = b"\xff" * count
    image.write_bytes(data)
    values = np.zeros((5000, 6000, 3), np.uint8)
    tifffile.imwrite(tmp_path / "strip.tif", values, rowsperstrip=5000, compression="zlib", photometric="rgb")
    inputs, out = (image, tmp_path / "strip.tif"), tmp_path / "out"
    result = script("segment", "predict", path, *inputs, "--output", out, "--max-pixels", 100_000, *CPU)
    assert result.status == 0, result.err
    assert "0 images segmented, 2 unreadable" in result.out
    assert "damaged.tif" in result.err
    assert "gdal_translate -co TILED=YES" in result.err
    assert not [file for file in out.rglob("*") if file.is_file()]


def test_a_full_disk_is_named(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, out = make_checkpoint(tmp_path / "net.safetensors"), tmp_path / "out"
    image = scene(tmp_path / "a.tif")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **where: Full())
    result = script("segment", "predict", path, image, "--output", out, "--max-pixels", 100_000, *CPU)
    assert result.status == 2
    assert f"error: {out / 'masks'}: No space left on device" in result.err
    assert not [file for file in out.rglob("*") if file.is_file()]


def test_a_scene_among_the_results_is_not_written_over(script: Any, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "net.safetensors")
    (tmp_path / "out" / "masks").mkdir(parents=True)
    image = scene(tmp_path / "out" / "masks" / "a.tif")
    before = image.read_bytes()
    options = ("--output", tmp_path / "out", "--overwrite", "--max-pixels", 100_000)
    result = script("segment", "predict", path, image, *options, *CPU)
    assert result.status == 2
    assert image.read_bytes() == before

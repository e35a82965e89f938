"""Scenes for tests: written by blocks, so that no test holds one whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

NO_DATA = 65535


def pixels(height: int, width: int, bands: int, seed: int = 0, dtype: str = "u2") -> np.ndarray:
    """``[H, W, bands]``, noise in the lower half of what the type holds."""
    high = np.iinfo(dtype).max // 2 if np.dtype(dtype).kind in "iu" else 1000
    return np.random.default_rng(seed).integers(0, high, (height, width, bands)).astype(dtype)


def write_tiff(path: Path, values: np.ndarray, no_data: object = None, **more: Any) -> Path:
    """Of pixels ``[H, W, C]``; deflated, unless ``more`` says otherwise."""
    planes = more.get("planarconfig", "contig") == "separate"
    how: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib", **more}
    if values.shape[2] == 1:
        how["planarconfig"], values = None, values[..., 0]
    if no_data is not None:
        how["extratags"] = [(42113, "s", 0, str(no_data), True)]
    tifffile.imwrite(path, np.moveaxis(values, -1, 0) if planes else values, **how)
    return path


def write_large(path: Path, side: int, bands: int, tile: int = 256) -> Path:
    """A square scene of uint16, deflated, of one tile after the other: row and column of a tile are in its values."""

    def tiles() -> Iterator[np.ndarray]:
        noise = pixels(tile, tile, bands) % 64
        for row in range(-(-side // tile)):
            for column in range(-(-side // tile)):
                yield noise + np.uint16(1000 * row + 100 * column)

    how: dict[str, Any] = {"shape": (side, side, bands), "dtype": np.uint16, "tile": (tile, tile)}
    tifffile.imwrite(path, tiles(), **how, compression="zlib", photometric="minisblack", planarconfig="contig")
    return path

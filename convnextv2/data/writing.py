"""Images written back in the units and the type that they came in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convnextv2.data.tiff import INSTALL
from convnextv2.files import atomic_path


def in_type(values: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Values as ``dtype``: rounded and brought within its limits if that is a type of whole numbers; NaN becomes 0."""
    kind = np.dtype(dtype)
    if kind.kind not in "iu":
        return values.astype(kind)
    limits = np.iinfo(kind)
    return np.clip(np.rint(np.nan_to_num(values)), limits.min, limits.max).astype(kind)


def write_tiff(path: Path, values: NDArray[Any]) -> None:
    """An array ``[C, H, W]`` as a TIFF of C bands, deflated, atomically.

    Raises:
        ValueError: if tifffile is not there.
        OSError: if the file cannot be written.
    """
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(f"a TIFF needs tifffile: {INSTALL}") from error
    whole = values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)
    how: dict[str, Any] = {} if len(values) == 1 else {"planarconfig": "contig"}
    with atomic_path(path) as temporary:
        tifffile.imwrite(temporary, whole, photometric="minisblack", compression="deflate", metadata=None, **how)

"""The handwritten digits that scikit-learn carries: 1,797 real images of 8×8 pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convnextv2.data.sources import CROP_SCALES, OpenedSource, Part, stratified_split

DIGITS = "digits"


@dataclass(frozen=True)
class DigitsSource:
    """Digits ``[N, 8, 8]`` uint8, enlarged (bicubic), gray in every channel."""

    digits: NDArray[np.uint8]
    img_size: tuple[int, int]
    in_chans: int

    def __len__(self) -> int:
        return len(self.digits)

    def load(self, index: int) -> Image.Image | NDArray[np.float32]:
        image = Image.fromarray(self.digits[index]).resize(self.img_size[::-1], Image.Resampling.BICUBIC)
        if self.in_chans in (1, 3):
            return image.convert("RGB")
        gray = np.asarray(image, dtype=np.float32)[..., None] / np.float32(255)
        return np.repeat(gray, self.in_chans, axis=-1)


def export_digits(folder: str | Path, part: str = "val", *, val_fraction: float = 0.2, seed: int = 0) -> list[Path]:
    """Write digits as 8×8 gray PNG files ``<folder>/<digit>/<number>.png``.

    The folder is made if it does not exist. ``part`` is ``val`` or ``train`` of the split for ``seed`` and
    ``val_fraction``, or ``all``. Returns the files, sorted; raises OSError if they cannot be written.
    """
    digits, labels = load_digits()
    train, val = stratified_split(labels, val_fraction, seed)
    parts = {"train": train, "val": val, "all": list(range(len(labels)))}
    if part not in parts:
        raise ValueError(f"part must be one of {', '.join(parts)}, got {part!r}")
    files = []
    for index in parts[part]:
        path = Path(folder) / str(labels[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits[index]).save(path)
        files.append(path)
    return sorted(files)


def load_digits() -> tuple[NDArray[np.uint8], list[int]]:
    """All digits ``[1797, 8, 8]``, 0 … 255, and which number each shows."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), [int(label) for label in bunch.target]


class DigitsKind:
    """The word ``digits``. They keep their handedness and most of their area."""

    expects = repr(DIGITS)

    def claims(self, spec: str) -> bool:
        return spec == DIGITS

    def open(self, spec: str, *, in_chans: int, img_size: tuple[int, int], labelled: bool, **_: object) -> OpenedSource:
        digits, labels = load_digits()
        part, classes = Part(DigitsSource(digits, img_size, in_chans), labels), [str(digit) for digit in range(10)]
        scale = dict.fromkeys(CROP_SCALES, (0.5, 1.0))
        return OpenedSource("handwritten digits", part, None, classes, hold_out=True, crop_scale=scale, hflip=0.0)


SOURCE_KIND = DigitsKind()

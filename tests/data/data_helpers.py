"""What the tests of data share."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image

Folder = Callable[..., Path]
"""Makes a folder of images: the fixture ``image_folder``."""


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path

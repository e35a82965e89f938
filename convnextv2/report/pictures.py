"""Pictures of a run, made small enough to lie in the page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, features

from convnextv2.data.decoding import USUAL, UnreadableImageError, open_image, reasons
from convnextv2.report.runs import FINETUNING, PRETRAINING, PROBE, SEGMENTATION, Run
from convnextv2.training.pictures import HEADING, is_ours

MOST_EPOCHS = 8
"""Reconstructions shown of a run: taken evenly, the first and the last among them."""
LARGEST_PICTURE, ALL_PICTURES = 150_000, 2_800_000
"""Bytes of one, and of all in a page, before they are written as text, which takes a third more."""
TRIES = ((840, 82), (840, 65), (640, 65), (480, 60), (360, 50), (240, 40))
"""Widths in pixels and qualities, until a picture is small enough."""
COLUMNS = ("original", "masked", "prediction", "prediction + visible")


@dataclass(frozen=True)
class Picture:
    """A picture in the page.

    Args:
        source: its bytes, as an address.
        width, height: pixels.
        epoch: after which it was drawn; None where it is of the best or the last.
        headed: whether its own headings are left out, for the page to write :data:`COLUMNS` above it.
    """

    source: str
    width: int
    height: int
    epoch: int | None = None
    headed: bool = False


@dataclass(frozen=True)
class Pictures:
    """Those of a run; ``shown`` of ``drawn`` reconstructions."""

    reconstructions: list[Picture]
    drawn: int
    neighbours: Picture | None
    confusion: Picture | None


def pictures(runs: Sequence[Run]) -> list[Pictures]:
    """Of each run; what cannot be read is told among its notices."""
    epochs = [_reconstructions(run.path) for run in runs]
    chosen = [_evenly(found) for found in epochs]
    budget = min(LARGEST_PICTURE, ALL_PICTURES // max(1, sum(map(len, chosen)) + 2 * len(runs)))
    found = []
    for run, drawn, kept in zip(runs, epochs, chosen, strict=True):
        if not drawn and run.kind == PRETRAINING and run.rows and run.recipe.get("reconstruct_every") != 0:
            run.notices.append("reconstructions: none were drawn yet, or they are missing")
        confusion = _single(run, "confusion_matrix.png", budget)
        if (
            run.kind in (FINETUNING, PROBE, SEGMENTATION)
            and run.rows
            and not (run.path / "confusion_matrix.png").exists()
        ):
            run.notices.append("confusion_matrix.png: is missing, or not drawn yet")
        rebuilt = _pictures(run, kept, budget)
        neighbours = _single(run, "neighbours.png", budget)
        found.append(Pictures(rebuilt, len(drawn), neighbours, confusion))
    return found


def _reconstructions(run: Path) -> list[tuple[int, Path]]:
    """Epochs and files, in order."""
    named = ((re.fullmatch(r"epoch_(\d{1,15})", path.stem), path) for path in run.glob("reconstructions/epoch_*.png"))
    return sorted((int(name[1]), path) for name, path in named if name)


def _evenly(found: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    if len(found) <= MOST_EPOCHS:
        return found
    return [found[round(place * (len(found) - 1) / (MOST_EPOCHS - 1))] for place in range(MOST_EPOCHS)]


def _pictures(run: Run, kept: list[tuple[int, Path]], budget: int) -> list[Picture]:
    found: list[Picture] = []
    start = 0
    for epoch, path in kept:
        picture, start = _picture(run, path, budget, epoch, start)
        found += [picture] if picture else []
    return found


def _single(run: Run, name: str, budget: int) -> Picture | None:
    return _picture(run, run.path / name, budget)[0] if (run.path / name).exists() else None


def _picture(run: Run, path: Path, budget: int, epoch: int | None = None, start: int = 0) -> tuple[Picture | None, int]:
    """The picture, and which of :data:`TRIES` a similar one may start with."""
    try:
        with reasons():
            if not path.is_file():
                raise UnreadableImageError("is no file")
            headed = epoch is not None and is_ours(path)
            with open_image(path, USUAL) as image:
                whole = image.convert("RGB")
    except UnreadableImageError as error:
        run.notices.append(f"{path.relative_to(run.path)}: left out: {error}")
        return None, start
    if headed and whole.height > HEADING:
        whole = whole.crop((0, HEADING, *whole.size))
    for place in range(start, len(TRIES)):
        image, written = _encoded(whole, *TRIES[place])
        if len(written) <= budget:
            break
    kind = "webp" if features.check("webp") else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(written).decode()}"
    return Picture(source, image.width, image.height, epoch, headed), max(0, place - 1)


def _encoded(whole: Image.Image, width: int, quality: int) -> tuple[Image.Image, bytes]:
    """A picture of at most that width, and of at most six times the height, and its bytes."""
    scale = min(1.0, width / whole.width, 6 * width / whole.height)
    size = max(1, round(whole.width * scale)), max(1, round(whole.height * scale))
    image = whole if scale == 1 else whole.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if features.check("webp"):
        image.save(buffer, "WEBP", quality=quality, method=4)
    else:
        image.save(buffer, "JPEG", quality=quality, optimize=True)
    return image, buffer.getvalue()

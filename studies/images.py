"""The images of a part of a study: a kind of source that takes others apart, always in the same way.

It is named as in ``study?data=photos&labels=0.1&seed=3``: a tenth of the labels of ``photos``, drawn by seed 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from convnextv2.data.decoding import Size, Wanted
from convnextv2.data.listings import walk_files
from convnextv2.data.opening import open_source, register_kind, why_unknown
from convnextv2.data.sources import OpenedSource, Part, Subset, stratified_split
from convnextv2.data.subsets import label_subset

PREFIX = "study?"
VAL_FRACTION, SPLIT_SEED = 0.2, 0
"""Of the split of data that has no validation part of its own; the same in all runs of a study."""


class StudyKind:
    """Training and validation part of another source, perhaps held out of its training part, or reduced."""

    expects = "the images of a study"

    def claims(self, spec: str) -> bool:
        return spec.startswith(PREFIX)

    def open(self, spec: str, *, in_chans: int, img_size: Size, labelled: bool, wanted: Wanted) -> OpenedSource:
        """Labels are needed in any case: pre-training sees the same training part."""
        asked = dict(parse_qsl(spec.removeprefix(PREFIX)))
        opened = _open(asked["data"], in_chans, img_size, wanted)
        train, val = opened.split(VAL_FRACTION, SPLIT_SEED)
        if "held_out" in asked:
            inner, held = stratified_split(_labels(train), float(asked["held_out"]), SPLIT_SEED)
            train, val = _take(train, inner), _take(train, held)
        if "images" in asked:
            train, val = (_at_most(part, int(asked["images"])) for part in (train, val))
        chosen = label_subset(_labels(train), float(asked.get("labels", 1)), int(asked.get("seed", 0)))
        return replace(opened, train=_take(train, chosen), val=val, hold_out=False)


def spec_of(data: str, wish: Mapping[str, Any]) -> str:
    """How the images are named that ``wish`` asks for: any of held_out, images, labels and seed."""
    return PREFIX + urlencode({"data": data, **wish}, safe="/")  # as a path it has no overlong part


@cache
def fingerprint(data: str) -> str:
    """What stands for the images in a hash: names and sizes of the files, not where they lie.

    Raises ValueError if nobody knows ``data``.
    """
    if problem := why_unknown(data):
        raise ValueError(f"data: {problem}")
    root = Path(data)
    if root.is_file():
        return f"{root.name} {root.stat().st_size}"
    if not root.is_dir():
        return data
    listing = "\n".join(
        f"{path.relative_to(root).as_posix()} {status.st_size}" for path, status in walk_files(root, [])
    )
    return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()[:16]


def count_images(spec: str, in_chans: int, img_size: Size, wanted: Wanted) -> int:
    """Training images of what :func:`spec_of` names."""
    train = open_source(spec, in_chans=in_chans, img_size=img_size, labelled=True, wanted=wanted).train
    return len(_labels(train))


@cache
def _open(data: str, in_chans: int, img_size: Size, wanted: Wanted) -> OpenedSource:
    return open_source(data, in_chans=in_chans, img_size=img_size, labelled=True, wanted=wanted)


def _labels(part: Part) -> Sequence[int]:
    assert part.labels is not None  # a source opened as labelled has them
    return part.labels


def _take(part: Part, numbers: Sequence[int]) -> Part:
    whole, labels = part.by_number, _labels(part)
    if isinstance(whole, Subset):
        subset = Subset(whole.source, [whole.numbers[number] for number in numbers])
    else:
        subset = Subset(whole, numbers)
    return Part(subset, [labels[number] for number in numbers], part.skipped)


def _at_most(part: Part, images: int) -> Part:
    labels = _labels(part)
    return _take(part, label_subset(labels, min(1.0, images / len(labels)), SPLIT_SEED))


register_kind(StudyKind())

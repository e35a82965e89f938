"""What the files beside a file of weights say of its images and classes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convnextv2.messages import one_line
from convnextv2.weights.guard import CheckpointError

NAMES = ("model.safetensors", "pytorch_model.bin")
"""Of weights in a folder of either."""
OURS = "sparse_fcmae"
"""Entry of ``config.json`` with what was said about weights that were exported here."""
MOST = 2**24
"""Bytes of such a file; the largest list of classes that is known, ImageNet-22K, has one million."""

logger = logging.getLogger(__name__)


def about_folder(weights: Path) -> dict[str, Any]:
    """``mean``, ``std``, ``img_size`` and ``class_names`` where ``config.json`` or ``preprocessor_config.json`` say so,
    and of an export of ours whatever was said.

    Args:
        weights: a file; what lies beside one of another name than :data:`NAMES` says nothing.

    Raises:
        CheckpointError: if such a file is too large or no JSON.
        OSError: if it cannot be opened.
    """
    if weights.name not in NAMES:
        return {}
    config, processor = (_read(weights.with_name(f"{name}config.json")) for name in ("", "preprocessor_"))
    if "architecture" in config:  # timm's
        return _of_timm(config)
    ours = config.get(OURS)
    found: dict[str, Any] = dict(ours) if isinstance(ours, Mapping) else {}
    found |= {name: processor[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in processor}
    cropped = processor.get("do_center_crop") and processor.get("crop_size")
    size = cropped or processor.get("size")
    if isinstance(size, Mapping):
        sides = [size.get(side, size.get("shortest_edge")) for side in ("height", "width")]
        found["img_size"] = None if None in sides else sides
    elif isinstance(size, int):
        found["img_size"] = [size]
    labels = config.get("id2label")
    if isinstance(labels, Mapping) and labels.keys() == {str(number) for number in range(len(labels))}:
        names = [labels[str(number)] for number in range(len(labels))]
        if not all(isinstance(name, str) and re.fullmatch(r"LABEL_\d+", name) for name in names):
            found["class_names"] = names
    return {name: value for name, value in found.items() if value is not None}


def _of_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    stated = config.get("pretrained_cfg")
    stated = stated if isinstance(stated, Mapping) else {}
    size = stated.get("input_size")
    sides = list(size[1:]) if isinstance(size, list) and len(size) == 3 else None
    found = {"mean": stated.get("mean"), "std": stated.get("std"), "img_size": sides}
    names = config.get("label_names")
    found["class_names"] = names if isinstance(names, list) else None
    return {name: value for name, value in found.items() if value is not None}


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        with file.open("rb") as opened:
            text = opened.read(MOST + 1)
        content = json.loads(text) if len(text) <= MOST else None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is no JSON ({one_line(error)}); repair or remove it") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: is no JSON object of at most {MOST:,} bytes; repair or remove it")
    return content


def class_names_of(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Those that metadata name, or none."""
    names = metadata.get("class_names", ())
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def names_beside(weights: Path, count: int) -> tuple[str, ...]:
    """Names of ``count`` classes from ``class_indices.json`` beside a file, or in its run folder; else none.

    One that does not name as many classes is of another network: that is logged as a warning, and it is passed over.
    """
    for file in filter(Path.is_file, (folder / "class_indices.json" for folder in weights.parents[:2])):
        try:
            indices = json.loads(file.read_text(encoding="utf-8"))
            if len(indices) != count:
                raise ValueError(f"it has {len(indices)} entries")
            return tuple(str(indices[str(number)]) for number in range(count))
        except (LookupError, TypeError, ValueError, RecursionError) as error:  # noqa: PERF203  # two files
            told = one_line(f"{type(error).__name__}: {error}")
            expected = f'{{"0": "name", ...}} for the {count} classes of {weights}'
            logger.warning("notice: %s: passed over: expected %s (%s)", file, expected, told)
    return ()

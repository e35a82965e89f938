"""Images and labels in the columns of a table, as parquet files and Hugging Face's data sets have them."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convnextv2.data.decoding import UnreadableImageError
from convnextv2.data.encoded import Encoded, Stored
from convnextv2.data.names import name_of
from convnextv2.data.sources import DataError, Part, Subset
from convnextv2.messages import one_line

IMAGE, LABEL = ("image", "img", "picture", "jpg", "jpeg", "png", "bytes"), ("label", "class", "cls", "target")
"""Names of columns, the first of which is the one to use."""
TRAIN, VAL = ("train", "training"), ("validation", "valid", "val", "dev")
"""Names of splits."""
MOST_CLASSES = 1_000_000


def library(name: str, spec: str, extra: str) -> Any:
    """An optional library; DataError that says what to install where it is not there."""
    if importlib.util.find_spec(name) is None:
        raise DataError(f"{spec}: needs {name}: pip install 'sparse-fcmae[{extra}]'")
    return importlib.import_module(name)


def image_column(schema: Any, spec: str) -> str:
    """The column of a pyarrow schema that holds image files: as bytes, or as Hugging Face's struct of bytes and path.

    Raises:
        DataError: if there is none, or more than one, none of which has a usual name.
    """
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(part.name == "bytes" and is_bytes(part.type) for part in kind)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    found = [column.name for column in schema if is_bytes(column.type)]
    chosen = [name for name in IMAGE if name in found] or (found if len(found) == 1 else [])
    if not chosen:
        columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
        what = "several columns of bytes and none is called `image`" if found else "no column of images"
        raise DataError(f"{spec}: has {what}; its columns are: {one_line(columns)[:300] or 'none'}")
    return chosen[0]


def label_column(schema: Any) -> str | None:
    """The column that holds labels, whole numbers or names; None where there is none."""
    from pyarrow import types

    def is_label(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return bool(types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))

    usable = {column.name for column in schema if is_label(column.type)}
    return next((name for name in LABEL if name in usable), None)


def is_whole(kind: Any) -> bool:
    """Whether a type of pyarrow is one of whole numbers."""
    from pyarrow import types

    return bool(types.is_integer(kind))


def class_names(schema: Any, column: str | None) -> list[str] | None:
    """Names of the classes, where Hugging Face's metadata say them."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        names = about["names"] if about["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return [*map(str, names)] if isinstance(names, list) and len({*map(str, names)}) == len(names) else None


def numbered(
    columns: Sequence[Sequence[Any]], names: Sequence[str] | None, spec: str
) -> tuple[list[list[int]], list[str]]:
    """Labels of each part as numbers of classes, -1 where there is none, and the names of the classes.

    Args:
        columns: values of each part, None where there is none; all whole numbers, or all names.
        names: of the classes, where they are known.

    Raises:
        DataError: if a number is of no class.
    """
    present = {value for part in columns for value in part if value is not None}
    if any(isinstance(value, str) for value in present):
        classes = sorted(str(value) for value in present)
        place = {name: number for number, name in enumerate(classes)}
        return [[-1 if value is None else place[str(value)] for value in part] for part in columns], classes
    highest = max(present, default=-1)
    if highest >= (MOST_CLASSES if names is None else len(names)):
        known = "numbers of classes, from 0 on" if names is None else f"numbers of its {len(names)} classes"
        raise DataError(f"{spec}: holds the label {highest}; expected {known}")
    labels = [[-1 if value is None or value < 0 else value for value in part] for part in columns]
    return labels, [*names] if names is not None else [str(number) for number in range(highest + 1)]


def part_of(images: Any, labels: Sequence[int] | None, labelled: bool, spec: str) -> Part:
    """A part of rows; those without label are left out where labels are insisted on, else no label counts then."""
    if labels is None:
        if labelled:
            raise DataError(f"{spec}: has no labels; expected a column `label` of whole numbers or names")
        return Part(images)
    missing = np.flatnonzero(np.asarray(labels) < 0).tolist()
    if not missing:
        return Part(images, labels)
    if not labelled:
        return Part(images)
    kept = np.flatnonzero(np.asarray(labels) >= 0).tolist()
    skipped = [(Path(name_of(images, number)), "has no label") for number in missing]
    return Part(Subset(images, kept), [labels[number] for number in kept], skipped)


def image_of(cell: Any, folder: Path) -> Stored:
    """The image file of a cell; UnreadableImageError if the cell is null, or names a file that is not there.

    Args:
        cell: bytes, or a struct of bytes and the path of a file, which counts where there are no bytes.
        folder: where paths that are not absolute begin.
    """
    content, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
    if content is not None:
        return Encoded(content, str(name or ""))
    if not name:
        raise UnreadableImageError("is null")
    path = folder / str(name)
    try:
        there = path.is_file()
    except (OSError, ValueError):
        there = False
    if not there:
        raise UnreadableImageError(f"names the file {one_line(name)[:160]}, which is not there")
    return path


def parts_by_name(names: Sequence[str]) -> dict[str, list[str]]:
    """Of names of splits those to train and to validate on; all to train on where none is called so."""
    train, val = ([name for name in names if name.lower() in wanted] for wanted in (TRAIN, VAL))
    return {"train": train or [*names], "val": val if train else []}

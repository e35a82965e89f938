"""Data sets of Hugging Face's library ``datasets``: folders that it saved, and names of its hub.

It keeps their rows in Arrow files that are mapped into memory, so that a row is had by its number at once.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convnextv2.data.decoding import Size, UnreadableImageError, Wanted
from convnextv2.data.encoded import Stored
from convnextv2.data.encoded_sources import EncodedSource, settled_by_sample
from convnextv2.data.names import shown
from convnextv2.data.sources import DataError, OpenedSource
from convnextv2.data.tables import (
    class_names,
    image_column,
    image_of,
    label_column,
    library,
    numbered,
    part_of,
    parts_by_name,
)
from convnextv2.messages import one_line

SCHEME = "hf://"
SAVED = ("dataset_dict.json",), ("state.json", "dataset_info.json")
"""Files of a folder that the library saved: of several splits, of one."""
_NAME = re.compile(
    r"hf://(?:datasets/)?(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^/:?]+))?(?:/(?P<config>[^/:?]+))?/?"
    r"(?:(?::|\?split=)(?P<split>[^?&]+))?"
)


@dataclass(frozen=True, eq=False)
class HubSource(EncodedSource):
    """The images of a data set, by number.

    Args:
        rows: of the data set, in the format ``arrow``.
        column: that holds the images.
        what: the data set is called, in messages.
        folder: where paths of images begin that are not absolute.
        in_chans, wanted: as :func:`~.images.load_image`.
    """

    rows: Any
    column: str
    what: str
    folder: Path
    in_chans: int
    wanted: Wanted

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The data set and the row, from 0."""
        return f"{self.what}: row {range(len(self))[index]}"

    def encoded(self, index: int) -> Stored:
        """The file in a cell; UnreadableImageError if it cannot be had."""
        try:
            cell = self.rows[range(len(self))[index]].column(self.column)[0].as_py()
        except (OSError, ValueError) as error:
            raise UnreadableImageError(f"its row cannot be read ({one_line(error)[:160]})") from error
        return image_of(cell, self.folder)


class HubKind:
    """A folder that ``datasets`` saved, or ``hf://ORG/NAME``, with ``@REVISION``, ``/CONFIG`` and ``:SPLIT`` or not."""

    expects = "a data set of Hugging Face, as hf://ORG/NAME[/CONFIG][:SPLIT]"

    def claims(self, spec: str) -> bool:
        if spec.startswith(SCHEME):
            return not spec.lower().endswith((".tar", ".parquet"))
        return any(all(os.path.isfile(f"{spec}/{name}") for name in names) for names in SAVED)  # noqa: PTH113  # of any text

    def open(self, spec: str, *, in_chans: int, img_size: Size, labelled: bool, wanted: Wanted) -> OpenedSource:
        """As :func:`~.opening.open_source`."""
        named = _NAME.fullmatch(spec) if spec.startswith(SCHEME) else None
        if spec.startswith(SCHEME) and named is None:
            raise DataError(f"{spec}: expected {HubKind.expects}, or ?split=SPLIT behind it")
        found = _loaded(spec, named)
        splits = found if isinstance(found, Mapping) else {"train": found}
        chosen = parts_by_name([*splits])
        if len(chosen["train"]) > 1:
            raise DataError(f"{spec}: none of its splits is called train: {', '.join(splits)}; name one")
        names = {part: splits[names[0]] for part, names in chosen.items() if names and (part == "train" or labelled)}
        schema = names["train"].features.arrow_schema
        column, label = image_column(schema, spec), label_column(schema)
        if any(not {column, label or column} <= {*rows.column_names} for rows in names.values()):
            raise DataError(f"{spec}: its splits differ in their columns")
        images = {
            part: HubSource(
                rows.select_columns(column).with_format("arrow"),
                column,
                spec if rows is found else f"{spec}, {chosen[part][0]}",
                Path() if named else Path(spec),
                in_chans,
                wanted,
            )
            for part, rows in names.items()
        }
        if not len(images["train"]):
            raise DataError(f"{spec}: found no image; it has no rows")
        wanted = settled_by_sample(wanted, images["train"])
        labels, classes = dict[str, Any](), list[str]()
        if label is not None:
            values = [rows.with_format("arrow")[label].to_pylist() for rows in names.values()]
            numbers, classes = numbered(values, class_names(schema, label), spec)
            labels = dict(zip(names, numbers, strict=True))
        parts = [part_of(replace(images[p], wanted=wanted), labels.get(p), labelled, spec) for p in images]
        return OpenedSource(spec, parts[0], parts[1] if len(parts) > 1 else None, [*map(shown, classes)])


def _loaded(spec: str, named: re.Match[str] | None) -> Any:
    """The data set, or its splits by name; DataError if that cannot be had."""
    datasets = library("datasets", spec, "hf")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each of its attempts is a line
    try:
        if named is None:
            return datasets.load_from_disk(spec)
        asked = named.groupdict()
        return datasets.load_dataset(asked["name"], asked["config"], split=asked["split"], revision=asked["revision"])
    except Exception as error:  # of the library, and of those that it reads and fetches with
        what = "loaded" if named is None else "had from the hub, nor from what was fetched before"
        raise DataError(f"{spec}: cannot be {what} ({type(error).__name__}: {one_line(error)[:300]})") from error


SOURCE_KIND = HubKind()

"""What may stand for a checkpoint: a file, a run folder, the name of a published one, an address, a name on the hub."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import re
from pathlib import Path
from typing import Any

import torch

from convnextv2.models.config import VARIANTS
from convnextv2.weights.addresses import file_name, path_of, scheme_of, short_digest, shown
from convnextv2.weights.download import cached
from convnextv2.weights.guard import CheckpointError
from convnextv2.weights.hub import PREFIX, hub_file
from convnextv2.weights.zoo import LICENCE, PUBLISHED, fetch

IN_FOLDERS = tuple(
    f"{folder}{name}{suffix}"
    for folders, names, suffixes in (
        (("checkpoints/", ""), ("best", "last"), (".safetensors", ".pth", ".pt")),
        (("",), ("model", "pytorch_model"), (".safetensors", ".bin", ".pth", ".pt")),
    )
    for folder, name, suffix in itertools.product(folders, names, suffixes)
)
"""Files that a folder stands for, best first: of a run of ours, then as transformers and timm name theirs."""
SPOILT = re.compile(r"^(https?|file):/(?!/)")
"""How an address begins that was made a Path."""


def resolve_path(given: str | os.PathLike[str]) -> Path:
    """The checkpoint file that ``given`` means, on this machine.

    Args:
        given: a path that exists, which always comes first: a file, or a folder (its :data:`IN_FOLDERS`: of a run the
            best checkpoint, else the last); the name of a published checkpoint (:data:`~.zoo.PUBLISHED`); an address,
            ``http``, ``https`` or ``file``; ``hf-hub:org/name`` or ``hf-hub:org/name@revision``. What is not here is
            downloaded, once.

    Raises:
        CheckpointError: if there is none, with the nearest name, or it cannot be downloaded.
        OSError: if the cache cannot be read or written.
    """
    path, text = Path(given), os.fspath(given)
    if not text:
        raise CheckpointError("no such file or folder: the path of the checkpoint is empty")
    # Of os.path, which do not raise, as Path's do, for what is too long for a path.
    if os.path.isfile(path):  # noqa: PTH113
        return path
    if os.path.isdir(path):  # noqa: PTH112
        return _in_folder(path)
    text = SPOILT.sub(r"\1://", text)
    scheme = scheme_of(text)
    try:
        if scheme == "file":
            return resolve_path(path_of(text))
        if scheme in ("http", "https"):
            return fetch_address(text)
        if text.startswith(PREFIX):
            return hub_file(text, IN_FOLDERS)
        if text in PUBLISHED:
            return fetch(text)
    except ValueError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{shown(text)}: {error}") from error
    raise CheckpointError(f"{shown(text)}: no such file or folder{_hint(text)}")


def is_name(given: str | os.PathLike[str]) -> bool:
    """Whether ``given`` stands for a checkpoint by its form, without there being a path of that name."""
    text = os.fspath(given)
    return bool(scheme_of(text)) or text.startswith(PREFIX) or text in PUBLISHED


def place_of_address(address: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Where the file of an address is kept, whether or not it is there: in torch's hub cache, in a folder of the
    address's own, for files of different places may have the same name; or in ``folder``."""
    own = Path(torch.hub.get_dir()) / "checkpoints" / short_digest(address)
    return (own if folder is None else Path(folder)) / file_name(address)


def fetch_address(address: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """The file of an address, downloaded to its :func:`place_of_address` unless it is there and whole; raises as
    :func:`~convnextv2.weights.download.cached`, and ValueError if it is none."""
    place = place_of_address(address, folder)
    try:
        return cached(address, place)
    except CheckpointError:
        if folder is None:
            with contextlib.suppress(OSError):  # it holds what came
                place.parent.rmdir()
        raise


def _in_folder(folder: Path) -> Path:
    found = next(filter(Path.is_file, (folder / name for name in IN_FOLDERS)), None)
    if found is None:
        raise CheckpointError(
            f"{folder}: no checkpoint in this folder; looked for {IN_FOLDERS[0]}, checkpoints/last.safetensors and "
            f"model.safetensors. Name the file itself"
        )
    return found


def _hint(text: str) -> str:
    """What else may have been meant by a name that is no path."""
    if scheme := scheme_of(text):
        return f"; weights come by http:// and https://, not by {scheme}:"
    if text.lower().replace("_", "-").startswith((PREFIX, "hf:")):
        return f"; write {PREFIX}org/name"
    stem = re.sub(r"\.(pth?|safetensors)$", "", text)
    if os.sep in text or not stem:
        return ""
    if stem in PUBLISHED:
        return f"; the published checkpoint is named {stem}"
    if stem in VARIANTS:
        own = [name for name, file in PUBLISHED.items() if file.variant == stem]
        return f"; {stem} is a network; its published weights are {', '.join(own)}" if own else ""
    near = difflib.get_close_matches(stem, PUBLISHED, 1)
    return f", and no published checkpoint is named so; did you mean {near[0]}?" if near else ""


def published(file: Path) -> dict[str, Any]:
    """What is known of a file of others that has the name of a published one, as metadata of a checkpoint."""
    known = PUBLISHED.get(file.stem)
    if known is None:
        return {}
    classes = {} if known.kind == "fcmae" else {"classes": "imagenet-1k"}
    return {"img_size": [known.resolution] * 2, "licence": LICENCE, **classes}

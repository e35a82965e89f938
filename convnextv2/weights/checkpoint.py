"""Checkpoint files: written atomically, read without ever executing what they contain.

Ours are ``.safetensors`` with the configuration as JSON in the header, or ``.pth`` holding
``{"model", "config", "metadata"}``. Official ``.pt`` files are read too;
:mod:`convnextv2.weights.layouts` knows their layouts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from convnextv2.data.transforms import Preprocessing, preprocessing_from_metadata
from convnextv2.files import atomic_path, finite
from convnextv2.models.config import config_from_dict, config_to_dict
from convnextv2.weights.beside import about_folder
from convnextv2.weights.guard import COMPILED, DEEPEST, SUFFIXES, CheckpointError, check_state, check_zip, plain
from convnextv2.weights.names import published, resolve_path
from convnextv2.weights.old_format import check_old_format
from convnextv2.weights.stated import Config, stated_metadata
from convnextv2.weights.unwrapping import unwrapped
from convnextv2.weights.whole import check_start, is_archive, is_safetensors

NESTING = ("model_ema", "state_dict_ema", "ema", "model", "state_dict", "model_state_dict", "module", "net", "network")
"""Where training scripts put the weights, best first: an averaged copy (EMA) is preferred to the raw weights."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file held.

    Args:
        state_dict: names to tensors on the CPU, wrapper prefixes (``module.``, ``_orig_mod.``) removed.
        config: the architecture, or None where the file is not ours.
        metadata: what was stored beside it, JSON values (for example ``mean`` and ``std`` of the images). For files
            with several sets of weights ``weights`` says which one was taken.
        path: the file read.
    """

    state_dict: dict[str, Tensor]
    config: Config | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()

    def preprocessing(self, in_chans: int, default_size: tuple[int, int] = (224, 224)) -> Preprocessing:
        """:func:`~convnextv2.data.transforms.preprocessing_from_metadata`, with the file named in errors."""
        try:
            return preprocessing_from_metadata(self.metadata, in_chans, default_size)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module | Mapping[str, Tensor],
    config: Config | None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write weights, configuration and metadata to one file, atomically.

    Args:
        path: ends in ``.safetensors`` (the configuration goes into the header), ``.pth`` or ``.pt``.
        model: a network, or a state dict.
        config: its architecture; None for weights in a foreign layout.
        metadata: JSON values.

    Raises:
        ValueError: if the suffix is another one.
        TypeError: if the metadata holds something JSON cannot.
        OSError: if the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise ValueError(
            f"{target}: a checkpoint must end in {', '.join(SUFFIXES)}, got {target.suffix or 'no suffix'!r}"
        )
    module = getattr(model, "_orig_mod", model)
    source = module.state_dict() if isinstance(module, nn.Module) else module
    # Copies, for none may be a view of a larger or a shared storage.
    state = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in source.items()
    }
    about = {} if config is None else {"config": config_to_dict(config)}
    about["metadata"] = finite(dict(metadata or {}))
    with atomic_path(target) as temporary:
        try:
            if target.suffix == ".safetensors":
                header = {"format": "pt", **{key: json.dumps(value) for key, value in about.items()}}
                safetensors.torch.save_file(state, temporary, metadata=header)
            else:
                with temporary.open("wb") as file:
                    torch.save({"model": state, "config": None, **about}, file)
        except (SafetensorError, RuntimeError) as error:
            raise OSError(f"cannot write {target}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: truncated or damaged safetensors file ({_first_line(error)}); copy or download it again"
        ) from error
    if not state:
        raise CheckpointError(f"{path}: holds no weights")
    content: dict[str, Any] = {"model": state}
    for key in header.keys() & {"config", "metadata"}:
        with contextlib.suppress(json.JSONDecodeError):  # other programs may use these names for text of their own
            try:
                content[key] = json.loads(header[key])
            except RecursionError as error:
                raise CheckpointError(f"{path}: its {key} is nested deeper than {DEEPEST} levels") from error
    return content


_DAMAGED = (
    RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, MemoryError,
    AssertionError, OSError, SafetensorError, struct.error,
)  # fmt: skip
"""What torch.load raises for damaged files depends on where the damage is. An OSError without a file name comes from a
seek beyond the end; torch 2.15 reads .safetensors, too."""


def _read_pickle(path: Path, archive: bool) -> Any:
    (check_zip if archive else check_old_format)(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is in the file torch only, which is looked at below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's own text advises to load without weights_only, which runs what is in the file.
        doubt = "" if "GLOBAL" in str(error) else "is not a torch checkpoint, or "
        raise CheckpointError(
            f"{path}: {doubt}holds Python objects beside tensors, which could run code, so it was not opened; in a "
            "place where you trust it, save its state dict alone"
        ) from error
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise CheckpointError(
            f"{path}: truncated or damaged, or no torch checkpoint ({_first_line(error)}); copy or download it again"
        ) from error


def _find_state(content: Any, path: Path) -> tuple[Mapping[str, Any], str | None]:
    """The mapping that holds the weights, and the name it was nested under."""
    name, state, levels = None, content if isinstance(content, Mapping) else {}, 0
    while (inner := next((key for key in NESTING if isinstance(state.get(key), Mapping) and state[key]), None)) or not (
        any(isinstance(item, Tensor) for item in state.values())
    ):
        name, levels = inner, levels + 1
        if name is None or levels > DEEPEST:
            keys = f"keys {', '.join(map(str, list(state)[:5]))}"
            raise CheckpointError(
                f"{path}: holds no weights (found {keys if isinstance(content, Mapping) else type(content).__name__}); "
                f"expected a state dict, or one under {', '.join(NESTING)}"
            )
        state = state[name]
    return state, name


def clean_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names without the prefixes of wrappers: ``module.`` (data parallel, EMA) and ``_orig_mod.`` (torch.compile)."""
    result = {name.replace(COMPILED, ""): value for name, value in state.items() if name != "n_averaged"}
    while result and all(name.startswith("module.") for name in result):
        result = {name.removeprefix("module."): value for name, value in result.items()}
    return result


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of ours or of any other project, without executing anything in it.

    Args:
        path: a ``.safetensors``, ``.pth`` or ``.pt`` file (told apart by content), a run folder, the name of a
            published checkpoint, an address: what :func:`~convnextv2.weights.names.resolve_path` takes.

    Raises:
        CheckpointError: if there is no such file, it is damaged, holds no weights, or more than weights.
        OSError: if it cannot be opened.
    """
    file = resolve_path(path)
    start = check_start(file)
    content: Any = _read_safetensors(file) if is_safetensors(start) else _read_pickle(file, is_archive(start))
    state, nested = _find_state(content, file)
    config, metadata = content.get("config"), content.get("metadata", about_folder(file))
    try:
        check_state(state, file.stat().st_size)
        ours = isinstance(config, Mapping) and "kind" in config
        architecture = config_from_dict(plain(config)) if ours else None
        about = {**({} if architecture else published(file)), **stated_metadata(metadata, architecture)}
        if nested is not None and len([key for key in NESTING if isinstance(content.get(key), Mapping)]) > 1:
            about["weights"] = nested
        return Checkpoint(unwrapped(clean_state_dict(state), file), architecture, about, file)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def as_checkpoint(checkpoint: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint itself, or the one that :func:`load_checkpoint` reads from the path."""
    return checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)

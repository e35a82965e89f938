"""What a run is resumed from, looked at before anything is loaded, executed or changed."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from convnextv2.weights.checkpoint import CheckpointError
from convnextv2.weights.guard import DEEPEST, HARMLESS, MOST_PICKLE, check_state, check_zip
from convnextv2.weights.loading import load_strict

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
STATES = ("state", "state.old")
"""Where the last complete state lies in ``checkpoints/``: a kill between the two renames of
:meth:`~convnextv2.training.run_folder.RunFolder.save_state` leaves it under its second name."""
_REQUIRED = ("progress.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl")
MOST_PASSES = 1_000_000
"""Passes through the images in an epoch that a run is resumed with."""
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What optimizers remember of a parameter in its own shape."""
_RANDOM = re.compile(
    rf"{HARMLESS.pattern}|numpy\.(_core|core)\.multiarray _reconstruct|numpy (ndarray|dtype)|numpy\.dtypes UInt32DType"
)
"""What the states of random generators name, which accelerate loads with ``weights_only`` too."""


def find_state(run: Path) -> Path | None:
    """The folder of the last state of the run in a folder, if it has one."""
    return next((path for name in STATES if (path := run / "checkpoints" / name).is_dir()), None)


def read_state(state: Path) -> dict[str, Any]:
    """The progress that a state belongs to, once all its files are found to be there, whole, and nothing but numbers.

    Raises:
        CheckpointError: naming the file and the reason.
    """
    name = ""
    try:
        for name in _REQUIRED:
            if not (state / name).is_file():
                raise ValueError("is missing")
        for path in sorted(state.iterdir()):
            name = path.name
            if path.suffix in (".bin", ".pkl", ".pt"):
                _check_pickle(path)
        name = "progress.json"
        return _read_progress(state / name)
    except Exception as error:  # what torch raises for a damaged file depends on where the damage is
        reason = " ".join(str(error).removeprefix(f"{state / name}: ").split())[:200]
        raise CheckpointError(
            f"{state / name}: cannot be resumed from ({reason}); start anew with `overwrite`"
        ) from error


def load_state(run: Path, accelerator: Accelerator, model: nn.Module) -> None:
    """Load the last state of the run in a folder, whose network is ``model``; CheckpointError if it does not fit."""
    state = find_state(run)
    assert state is not None
    path, own = state / "model.safetensors", model.state_dict()
    try:
        weights = safetensors.torch.load_file(path)
        load_strict(model, weights, path)
        if other := [name for name in own if weights[name].dtype != own[name].dtype]:
            raise ValueError(f"{other[0]} holds {weights[other[0]].dtype}, not {own[other[0]].dtype}")
        accelerator.load_state(str(state))
        for optimizer in accelerator._optimizers:
            for parameter, values in optimizer.state.items():
                if any(values[name].shape != parameter.shape for name in _MOMENTS if name in values):
                    raise ValueError("the state of the optimizer is of another network")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as above
        reason = " ".join(str(error).removeprefix(f"{path}: ").split())[:200]
        raise CheckpointError(f"{state}: cannot be resumed from ({reason}); start anew with `overwrite`") from error


def _check_pickle(path: Path) -> None:
    random = path.name.startswith("random_states_")
    check_zip(path, _RANDOM if random else HARMLESS)
    if not random:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_state(_tensors(content), path.stat().st_size)


def _tensors(content: Any) -> dict[str, Tensor]:
    """All tensors in nested dictionaries and lists, which may hold themselves."""
    found: dict[str, Tensor] = {}
    seen, rest = set[int](), [content]
    while rest:
        value = rest.pop()
        if isinstance(value, Tensor):
            found[f"tensor {len(found)}"] = value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            rest += value.values() if isinstance(value, dict) else value
    return found


def _read_progress(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MOST_PICKLE:
        raise ValueError("is larger than what a run writes")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not _is_flat(found, DEEPEST):
        raise ValueError(f"expected an object of at most {DEEPEST} levels")
    epoch, step, best, passes = found.get("epoch"), found.get("step"), found.get("best", {}), found.get("passes", 1)
    holds = {
        "epoch": _is_count(epoch),
        "step": _is_count(step),
        "passes": _is_count(passes) and passes <= MOST_PASSES,
        "config": isinstance(found.get("config"), dict),
        "best": isinstance(best, dict) and all(_is_number(value) for value in best.values()),
    }
    if wrong := [name for name, right in holds.items() if not right]:
        raise ValueError(f"{', '.join(wrong)} missing or of another kind than a run writes")
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, none where it is missing. A line that a kill cut off is left out.

    Raises:
        CheckpointError: if a line is whole, but no row.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
        except RecursionError:
            row = None
        except ValueError:
            logger.warning("left out a damaged line of the metrics: %s", line[:80])
            continue
        if not isinstance(row, dict) or not _is_count(row.get("epoch")):
            raise CheckpointError(f"{path}: line {number} is no row of a run: {line[:40]}; take it out")
        rows.append(row)
    return rows


def _is_flat(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(item, levels - 1) for item in inner)


def _is_count(value: Any) -> bool:
    """Whether a value of JSON is a whole number from 1 on, of a size that a run can reach."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53


def _is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf

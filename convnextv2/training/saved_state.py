"""What a run is resumed from, looked at before anything is loaded, executed or changed."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from convnextv2.training.sharding import as_shards
from convnextv2.training.so_far import is_number, is_so_far
from convnextv2.weights.checkpoint import CheckpointError
from convnextv2.weights.download import sha256
from convnextv2.weights.guard import DEEPEST, HARMLESS, MOST_PICKLE, check_state, check_zip
from convnextv2.weights.loading import load_strict

logger = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"
"""Of the files of a state, in sha256; written last. Those of earlier versions have none."""
_REQUIRED = ("progress.json", "model.safetensors", "optimizer.bin")
MOST_PASSES = 1_000_000
"""Passes through the images in an epoch that a run is resumed with."""
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What optimizers remember of a parameter in its own shape."""
_ASKED = ("weight_decay", "betas", "lr_scale")
"""What of a group of parameters the options of a run say, those of a resumed one too."""
_RANDOM = re.compile(
    rf"{HARMLESS.pattern}|numpy\.(_core|core)\.multiarray _reconstruct|numpy (ndarray|dtype)|numpy\.dtypes UInt32DType"
)
"""What the states of random generators name, which accelerate loads with ``weights_only`` too."""


def read_state(state: Path) -> dict[str, Any]:
    """The progress that a state belongs to, once all its files are found to be there, whole, and nothing but numbers.

    Raises:
        CheckpointError: naming the file and the reason.
    """
    name = CHECKSUMS
    try:
        sums = _read_json(state / name) if (state / name).is_file() else {}
        for name in dict.fromkeys((*_REQUIRED, *(Path(name).name for name in sums))):
            if not (state / name).is_file():
                raise ValueError("is missing")
            if name in sums and sums[name] != sha256(state / name):
                raise ValueError("is not what was written: its checksum differs")
        for path in sorted(state.iterdir()):
            name = path.name
            if path.suffix in (".bin", ".pkl", ".pt", ".json") and not path.is_file():
                raise ValueError("is no file")
            if path.suffix in (".bin", ".pkl", ".pt"):
                _check_pickle(path)
        name = "progress.json"
        return _read_progress(state / name)
    except Exception as error:  # what torch raises for a damaged file depends on where the damage is
        reason = " ".join(str(error).removeprefix(f"{state / name}: ").split())[:200]
        raise CheckpointError(
            f"{state / name}: cannot be resumed from ({reason}); start anew with `overwrite`"
        ) from error


def load_state(state: Path, model: nn.Module, others: Mapping[str, Any]) -> None:
    """Load a state into a network and into what else has one: CheckpointError if it does not fit.

    The optimizer's groups keep what of :data:`_ASKED` they have.

    Args:
        state: its folder.
        model: the network, as it was before accelerate prepared it.
        others: names of files to what loads their contents: ``optimizer.bin`` to the optimizer.
    """
    path, own = state / "model.safetensors", model.state_dict()
    asked = type(others["optimizer.bin"]).__name__
    groups = [dict(group) for group in others["optimizer.bin"].param_groups]
    try:
        weights = safetensors.torch.load_file(path)
        load_strict(model, as_shards(weights, model), path)
        if other := [name for name in own if weights[name].dtype != own[name].dtype]:
            raise ValueError(f"{other[0]} holds {weights[other[0]].dtype}, not {own[other[0]].dtype}")
        if (before := _read_json(state / "progress.json").get("optimizer", asked)) != asked:
            raise ValueError(f"the state is of another `optimizer`, {before}, not {asked}")
        extra = {path.name for path in state.glob("custom_checkpoint_*")}
        if different := extra ^ {name for name in others if name.startswith("custom_checkpoint_")}:
            averaged = "with" if different <= extra else "without"
            raise ValueError(f"{min(different)}: the state is {averaged} averaged weights, keep `ema_decay`")
        for name, target in others.items():
            content = torch.load(state / name, map_location="cpu", weights_only=True)
            if target is others["optimizer.bin"] and _sizes(content["param_groups"]) != _sizes(groups):
                raise ValueError(
                    "the state groups the parameters in another way: keep `official_weight_decay`, `layer_decay_type`, "
                    "`linear_probe`, and `layer_decay` at 1 or below it"
                )
            target.load_state_dict(as_shards(content, target))
        optimizer = others["optimizer.bin"]
        for before, group in zip(groups, optimizer.param_groups, strict=True):
            if before.keys() - group.keys():
                raise ValueError("the state is of another `optimizer`")
            group |= {name: before[name] for name in _ASKED if name in before}
        for parameter, values in optimizer.state.items():
            if any(values[name].shape != parameter.shape for name in _MOMENTS if name in values):
                raise ValueError("the state of the optimizer is of another network")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as above
        reason = " ".join(str(error).removeprefix(f"{path}: ").split())[:200]
        raise CheckpointError(f"{state}: cannot be resumed from ({reason}); start anew with `overwrite`") from error


def _sizes(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


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


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MOST_PICKLE:
        raise ValueError("is larger than what a run writes")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not _is_flat(found, DEEPEST):
        raise ValueError(f"expected an object of at most {DEEPEST} levels")
    return found


def _read_progress(path: Path) -> dict[str, Any]:
    found = _read_json(path)
    epoch, step, best, passes = found.get("epoch"), found.get("step"), found.get("best", {}), found.get("passes", 1)
    inside, skipped = found.get("inside"), found.get("skipped", 0)
    holds = {
        "epoch": _is_count(epoch) or (epoch == 0 and inside is not None),
        "step": _is_count(step),
        "skipped": skipped == 0 or _is_count(skipped),
        "seed": isinstance(found.get("seed", 0), int),
        "inside": inside is None or is_so_far(inside),
        "passes": _is_count(passes) and passes <= MOST_PASSES,
        "config": isinstance(found.get("config"), dict),
        "optimizer": isinstance(found.get("optimizer", ""), str),
        "best": isinstance(best, dict) and all(is_number(value) for value in best.values()),
    }
    if wrong := [name for name, right in holds.items() if not right]:
        raise ValueError(f"{', '.join(wrong)} missing or of another kind than a run writes")
    return found


def read_rows(path: Path, tell: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, none where it is missing. A line that a kill cut off is left out.

    With ``tell``, which takes a line for the user, one that is no row is left out as well, and nothing is refused.

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
            if tell is None:
                logger.warning("left out a damaged line of the metrics: %s", line[:80])
            else:
                tell(f"{path.name}: line {number} is damaged and left out")
            continue
        if not isinstance(row, dict) or not _is_count(row.get("epoch")):
            if tell is not None:
                tell(f"{path.name}: line {number} is no row of a run and left out")
                continue
            raise CheckpointError(f"{path}: line {number} is no row of a run: {line[:40]}; take it out")
        rows.append(row)
    return rows


def _is_flat(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(item, levels - 1) for item in inner)


def _is_count(value: Any) -> bool:
    """Whether a value of JSON is a whole number from 1 on, of a size that a run can reach."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53

"""Doing a part: its run or its look at frozen features, and the record of what came of it."""

from __future__ import annotations

import functools
import shutil
import subprocess
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import hardware
from convnextv2.data.build import build_finetune_datasets
from convnextv2.evaluation import load_encoder
from convnextv2.models.encoder import Encoder
from convnextv2.training import FinetuneResult, PretrainResult, run_task
from convnextv2.training.states import find_state, state_folders
from studies.frozen import accuracy, extract
from studies.parts import FROZEN, Part
from studies.variants import StudyClassifier, StudyPretrain

LIBRARIES = ("timm", "accelerate", "numpy", "scikit-learn")


def do(part: Part, folder: Path, probes: int, **free: Any) -> dict[str, Any]:
    """Do a part in the folder of a study, going on where it was left, and tell what came of it; raises what runs raise.

    Args:
        part: what it starts from is done.
        folder: of the study.
        probes: looks at the features during a pre-training.
        free: options that leave the numbers as they are.
    """
    start, run, code = time.perf_counter(), part.run(folder), code_version()
    if find_state(run) is None:  # nothing to go on with
        shutil.rmtree(run, ignore_errors=True)
    options = part.options(folder, **free)
    wants_gpu = options.device.startswith("cuda") or options.device == "auto"
    device = torch.device("cuda" if wants_gpu and torch.cuda.is_available() else "cpu")
    if part.kind in FROZEN:
        found = _frozen(part, options, device)
    else:
        with (part.place(folder) / "log.txt").open("a", encoding="utf-8") as log:
            quiet = {"log": lambda line: log.write(f"{line}\n"), "progress": lambda batches, total, text: batches}
            found = (_pretrain if part.kind == "pretrain" else _finetune)(part, options, probes, quiet)
    wall = time.perf_counter() - start
    return {
        "seconds": round(found.pop("seconds", wall), 2),
        "result": found,
        "session_seconds": round(wall, 2),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "versions": {name: version(name) for name in LIBRARIES},
        "code": code,
        "free": free,
        "determined_by": part.determined_by,
    }


def tidy(part: Part, folder: Path) -> None:
    """Delete what of a part that is done no other needs: the state to resume from, and weights that were fine-tuned."""
    kept = part.run(folder) / "checkpoints"
    for folder in state_folders(kept) if part.kind == "pretrain" else [kept]:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def code_version() -> str:
    """The commit, with a plus where files differ from it."""
    git = functools.partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        commit, changed = git(["git", "rev-parse", "HEAD"]), git(["git", "status", "--porcelain", "-uno"])
    except OSError:
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout else "") if commit.returncode == 0 else "unknown"


def _pretrain(part: Part, options: Any, probes: int, quiet: dict[str, Any]) -> dict[str, Any]:
    task = StudyPretrain(options)
    task.variant, task.probes = part.variant, min(probes, options.epochs)
    result = run_task(task, PretrainResult, **quiet)
    probed = [[row["epoch"], row["knn"]] for row in result.metrics if "knn" in row]
    diversity = [result.metrics[-1][f"feature_diversity_{stage}"] for stage in range(1, 5)]
    found = {"loss": result.last_loss, "knn": probed, "feature_diversity": diversity}
    return {**found, "images": result.images[0], "seconds": _seconds(result)}


def _finetune(part: Part, options: Any, probes: int, quiet: dict[str, Any]) -> dict[str, Any]:
    """The accuracy is that of the last epoch: the best one would be chosen by the images that it is measured on."""
    task = StudyClassifier(options)
    task.variant = part.variant
    result = run_task(task, FinetuneResult, **quiet)
    seen = {"images": result.images[0], "val_images": result.val_images}
    return {"top1": result.metrics[-1]["val_top1"], **seen, "seconds": _seconds(result)}


def _seconds(result: PretrainResult | FinetuneResult) -> float:
    """Of training, in all sessions; without evaluation, probes and saving."""
    return sum(row["seconds"] for row in result.metrics)


def _frozen(part: Part, options: Any, device: torch.device) -> dict[str, Any]:
    shape, in_chans = options.encoder(), options.encoder().in_chans
    statistics: dict[str, Any] = {}
    if part.needs is None:
        torch.manual_seed(part.seed)
        encoder = Encoder(shape)
    else:
        frozen = load_encoder(options.init)
        encoder, statistics = frozen.model, {"mean": frozen.mean, "std": frozen.std}
    wanted = options.wanted
    train, val = build_finetune_datasets(options.data, options.size, in_chans, **statistics, wanted=wanted)
    encoder.to(device)
    top1 = accuracy(part.kind, extract(encoder, train), extract(encoder, val))
    return {"top1": top1, "images": len(train), "val_images": len(val)}

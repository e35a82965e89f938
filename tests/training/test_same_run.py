"""A run is the same in any number of processes and with any accumulation, for the same images an update.

Two processes: tests/training/test_golden.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from train_helpers import make_images, weights

from convnextv2.training import FinetuneOptions, PretrainOptions, finetune, pretrain
from convnextv2.training.recipe import parse_options

OWN = {
    "pretrain": "--backend cpu --decoder-dim 16 --reconstruct-every 0 --probe none",
    "finetune": "--mixup 0.8 --cutmix 1 --random-erasing 0.25 --ema-decay 0.9 --auto-augment rand-m9-mstd0.5-inc1",
}
WAYS = {"one process": (1, 8, 1), "accumulation": (1, 2, 4), "four processes": (4, 2, 1)}
"""Processes, batch size and accumulation: always 8 images an update."""
UPDATES = {"pretrain": 50, "finetune": 40}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set", count=27)


def run(processes: int, script: str, arguments: list[str]) -> None:
    if processes > 1:
        done = launching.run(processes, script, *arguments)
        assert [bool(one.stdout) for one in done] == [True] + [False] * (processes - 1)
        assert not any(one.stderr for one in done[1:])
    elif script == "pretrain":
        pretrain(parse_options(PretrainOptions, arguments))
    else:
        finetune(parse_options(FinetuneOptions, arguments))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_processes_and_accumulation_share_a_run(images: Path, tmp_path: Path, script: str) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (processes, size, accum) in WAYS.items():
        sizes = f"--batch-size {size} --accum {accum} --epochs 5 --drop-path 0.3 --lr 2e-3 --data {images}"
        output = tmp_path / name
        given = [*launching.TINY, *OWN[script].split(), *sizes.split(), "--output", str(output), "--device", "cpu"]
        run(processes, script, given)
        found[name] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    whole, *others = found.values()
    loss = "loss" if script == "pretrain" else "train_loss"
    assert whole[-1]["step"] == UPDATES[script]
    assert whole[-1][loss] < whole[0][loss]
    for name, other in zip(list(WAYS)[1:], others, strict=True):
        assert [row["step"] for row in other] == [row["step"] for row in whole]
        assert [row[loss] for row in other] == pytest.approx([row[loss] for row in whole], rel=1e-6), name
        mine, theirs = weights(tmp_path / "one process"), weights(tmp_path / name)
        for part, value in mine.items():
            torch.testing.assert_close(theirs[part], value, rtol=1e-5, atol=1e-5, msg=f"{name}: {part}")

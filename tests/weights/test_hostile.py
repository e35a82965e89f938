"""Hostile checkpoints through every script that reads one: a line, status 2, little time, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import forked
import hostile
import pytest
from hostile_run import CUSTOM, ENTRIES, RUN

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "scripts"
SECONDS, MEGABYTES = 5, 1500
HARMLESS = {
    "pretrain": {"one_mean_for_three_channels"},
    "convert": {"one_mean_for_three_channels", "zip_of_entries_that_share_their_bytes"},
    "resume": hostile.ONLY_HEADER,  # a run knows its network, and takes the tensors alone
}
"""Of these the entry needs nothing that is wrong with them."""


@pytest.fixture
def place(tmp_path) -> Path:
    import numpy as np
    from PIL import Image

    folder = tmp_path / "place"
    for name in "ab":
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    custom = [*CUSTOM, "--decoder-dim", "16", "--output", "run"]
    forked.run(SCRIPTS / "pretrain.py", *RUN, *custom, cwd=folder).check_returncode()
    return folder


@pytest.mark.slow
def test_one_line_and_nothing_written(place):
    """All entries in one process: writing the files takes as long as giving them to a script."""
    assert len(hostile.HOSTILE) > 60
    command = [sys.executable, "-W", "ignore", HERE / "hostile_run.py", place, *ENTRIES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {(row["entry"], row["name"]) for row in rows} == set(product(ENTRIES, hostile.HOSTILE))
    wrong = []
    for row in rows:
        told = [line for line in row["lines"] if line.startswith("error: ")]
        traced = any("Traceback" in line for line in row["lines"])
        ended = row["status"] == 2 and len(told) == 1 and row["lines"][-1] == told[0] and not row["written"]
        harmless = row["name"] in HARMLESS.get(row["entry"], ()) and row["status"] == 0
        slow = row["seconds"] > SECONDS and not harmless  # which trains
        if traced or not (ended or harmless) or slow or row["megabytes"] > MEGABYTES:
            wrong.append(row)
    assert not wrong, json.dumps(wrong, indent=1)

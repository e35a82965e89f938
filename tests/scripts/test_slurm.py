"""The batch script for Slurm, with stand-ins for Slurm's commands and torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm.sbatch"
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
}  # fmt: skip
STAND_INS = {
    "srun": 'shift; exec "$@"',
    "scontrol": 'echo "scontrol $*" >> told; [ "$1" = show ] && printf "a\\nb\\n"; true',
    "torchrun": 'echo "$*" >> told; trap "echo saved >> told; exit 143" TERM; touch begun\n'
    'for i in $(seq 100); do [ -e end ] && exit "$(cat end)"; sleep 0.05; done',
}


@pytest.fixture
def job(tmp_path: Path) -> subprocess.Popen[str]:
    for name, text in STAND_INS.items():
        file = tmp_path / name
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    environment = {**os.environ, **SLURM, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": "photos"}
    started = subprocess.Popen(["bash", str(SCRIPT)], cwd=tmp_path, env=environment, text=True)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    return started


def test_a_job_that_is_about_to_end_saves_and_is_queued_again(job: subprocess.Popen[str], tmp_path: Path) -> None:
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 0
    shown, started, *rest = (tmp_path / "told").read_text().splitlines()
    assert shown == "scontrol show hostnames a,b"
    assert rest == ["saved", "scontrol requeue 7"]
    assert "--nnodes 2 --nproc-per-node 8" in started
    assert "--rdzv-endpoint a:29500" in started
    assert started.endswith("--data photos --output runs/pretrain --resume auto")


@pytest.mark.parametrize("status", [0, 2])
def test_a_job_that_ends_by_itself_says_how(job: subprocess.Popen[str], tmp_path: Path, status: int) -> None:
    (tmp_path / "end").write_text(str(status))
    assert job.wait(20) == status
    assert "requeue" not in (tmp_path / "told").read_text()

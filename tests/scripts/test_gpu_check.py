"""``scripts/gpu_check.sh`` with an interpreter that stands in for Python on a machine with a GPU."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = {
    "hardware": {"device": "a GPU"},
    "options": {"models": ["convnextv2_tiny"], "img_size": [224, 192], "threads": None},
    "results": [{"model": "convnextv2_tiny", "speedup": 2.5, "error": 1e-3, "memory_ratio": None, "times_ms": [1.0]}],
}
STAND_IN = """#!/usr/bin/env bash
for argument in "$@"; do
    case "$argument" in
        -c) exit {gpu} ;;
        benchmarks/report.py) exec {python} "$@" ;;
    esac
done
echo "$*" >> {calls}
while [ $# -gt 0 ]; do
    case "$1" in
        pytest) echo "3 passed"; exit {tests} ;;
        --json) echo '{sample}' > "$2" ;;
    esac
    shift
done
echo "the last line"
"""


@pytest.fixture
def check(tmp_path):
    def run(*, gpu: int = 0, tests: int = 0) -> subprocess.CompletedProcess[str]:
        python = tmp_path / "python"
        values = {"gpu": gpu, "tests": tests, "python": sys.executable, "calls": tmp_path / "calls"}
        text = STAND_IN
        for name, value in {**values, "sample": json.dumps(SAMPLE)}.items():
            text = text.replace(f"{{{name}}}", str(value))
        python.write_text(text)
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        return subprocess.run(
            [ROOT / "scripts/gpu_check.sh", tmp_path / "out"],
            env={**os.environ, "PYTHON": str(python), "PROCESSES": "2"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_it_leaves_a_report_of_every_part(check, tmp_path):
    done = check()
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "out/gpu-check.md").read_text()
    for part in ("parity", "ops", "encoder-atto", "encoder-tiny", "encoder-base", "step", "minkowski"):
        assert f"- {part}: passed" in report
    assert re.search(r"parity: passed, \d+ s; 6 passed, 0 failed, 0 skipped, in 2 processes", report)
    assert "| convnextv2_tiny | 2.50× | 1.0e-03 |" in report
    assert "img_size 224×192" in report
    reports = json.loads((tmp_path / "out/gpu-check.json").read_text())["reports"]
    assert set(reports) == {"ops", "encoder-atto", "encoder-tiny", "encoder-base", "step", "minkowski"}
    calls = (tmp_path / "calls").read_text()
    assert calls.count("-m cuda tests/ops tests/models") == 2
    assert calls.count("--device cuda") == 6


def test_a_failed_test_is_told_and_is_the_status(check, tmp_path):
    done = check(tests=1)
    assert done.returncode == 1
    assert "- parity: FAILED, status 1" in (tmp_path / "out/gpu-check.md").read_text()


def test_without_a_gpu_it_says_so(check, tmp_path):
    done = check(gpu=1)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr

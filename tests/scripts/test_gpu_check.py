"""``scripts/gpu_check.sh`` with an interpreter that stands in for Python on a machine with a GPU."""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ["ops", "encoder-tiny", "profile", "encoder-atto", "encoder-base", "step", "encoder-base-256", "ops-base"]
PARTS += ["step-tiny", "backends", "parity", "sanitizer", "finetune", "minkowski"]
SAMPLE = {
    "hardware": {"device": "a GPU"},
    "options": {"models": ["convnextv2_tiny"], "img_size": [224, 192], "threads": None},
    "results": [{"model": "convnextv2_tiny", "speedup": 2.5, "error": 1e-3, "memory_ratio": None, "times_ms": [1.0]}],
}
STAND_IN = """#!/usr/bin/env bash
for argument in "$@"; do
    case "$argument" in
        -c) case "$2" in *compute-sanitizer*) exit 1 ;; *torch*) exit $NO_GPU ;; *) exit 0 ;; esac ;;
        */gpu_check.py) exec {python} "$@" ;;
    esac
done
all=$*
json=
tests=
while [ $# -gt 0 ]; do
    case "$1" in
        pytest) tests=yes ;;
        --json) json=$2 ;;
    esac
    shift
done
if [ -n "$json" ]; then cp {sample} "$json"; fi  # the first figure, at once
echo "$TEST_SHARD $TRITON_CACHE_DIR $all" >> {calls}
name=$(basename "$json" .json)
if [ "$name" = ops ]; then lines=${LINES_SAID:-0}; fi
for ((i = 0; i < lines; i++)); do echo "a line of many: $i {sixty}"; done
if [ "$name" = "$HANGS" ]; then trap '' TERM; while :; do sleep 0.05; done; fi
sleep "${PART_SECONDS:-0}"
if [ -n "$tests" ]; then
    echo "tests/ops/test_a.py::test_b PASSED"
    if [ "$NO_TESTS" = 1 ]; then echo "FAILED tests/ops/test_a.py::test_c - assert 0"; fi
    echo "== $NO_TESTS failed, 3 passed in 0.1s =="
    exit "$NO_TESTS"
fi
echo "the last line"
if [ "$name" = "$FAILS" ]; then exit 2; fi
"""


class Machine:
    """A folder, and the interpreter that stands in."""

    def __init__(self, folder: Path) -> None:
        self.out, self.calls = folder / "out", folder / "calls"
        sample, self.python = folder / "sample.json", folder / "python"
        sample.write_text(json.dumps(SAMPLE))
        text = STAND_IN
        for name, value in {"python": sys.executable, "calls": self.calls, "sample": sample, "sixty": "=" * 60}.items():
            text = text.replace(f"{{{name}}}", str(value))
        self.python.write_text(text)
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)

    def start(self, *arguments: object, **variables: object) -> subprocess.Popen[str]:
        given = {"PYTHON": self.python, "PROCESSES": 2, "NO_GPU": 0, "NO_TESTS": 0, "HANGS": "-", "FAILS": "-"}
        return subprocess.Popen(
            [ROOT / "scripts/gpu_check.sh", *map(str, arguments), self.out],
            env={**os.environ, **{k: str(v) for k, v in {**given, **variables}.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, **variables: object) -> tuple[int, str]:
        """Status, and what was said."""
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out + err

    @property
    def report(self) -> str:
        return (self.out / "gpu-check.md").read_text()

    @property
    def reports(self) -> dict[str, dict]:
        return json.loads((self.out / "gpu-check.json").read_text())["reports"]

    def packed(self) -> set[str]:
        with tarfile.open(self.out / "gpu-check.tar.gz") as tar:
            return {Path(name).name for name in tar.getnames()}


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_it_leaves_a_report_of_every_part(machine):
    status, said = machine.run()
    assert status == 0, said
    for part in set(PARTS) - {"sanitizer"}:
        assert f"- {part}: passed" in machine.report
    assert "- sanitizer: not run, no compute-sanitizer here" in machine.report
    assert re.search(r"parity: passed, \d+ s; 6 passed, 0 failed, 0 skipped, in 2 processes", machine.report)
    assert "| convnextv2_tiny | 2.50× | 1.0e-03 |" in machine.report
    assert "img_size 224×192" in machine.report
    measured = set(PARTS) - {"parity", "sanitizer", "backends"}
    assert set(machine.reports) == measured
    calls = machine.calls.read_text()
    assert calls.count("-m cuda tests/ops tests/models") == 2
    assert re.findall(r"^(\d/\d) .* tests/ops", calls, re.M) in (["1/2", "2/2"], ["2/2", "1/2"])
    assert calls.count("--device cuda") == 10
    assert machine.packed() >= {"gpu-check.md", "gpu-check.json", "parts.json", "ops.json", "ops.log", "parity-2.log"}


def test_what_matters_most_comes_first(machine):
    machine.run()
    scripts = re.findall(r"--json \S+/([\w-]+)\.json", machine.calls.read_text())
    assert scripts == [part for part in PARTS if part not in ("parity", "sanitizer", "backends")]


def test_a_failed_test_is_told_and_is_the_status(machine):
    status, _ = machine.run(NO_TESTS=1)
    assert status == 1
    assert "- parity: FAILED, status 1" in machine.report
    assert "6 passed, 2 failed, 0 skipped, in 2 processes; tests/ops/test_a.py::test_c" in machine.report


def test_a_part_that_fails_is_told_with_what_it_measured(machine):
    status, _ = machine.run(FAILS="step")
    assert status == 1
    assert "- step: FAILED, status 2" in machine.report
    assert "- encoder-base-256: passed" in machine.report
    assert "step" in machine.reports


def test_without_a_gpu_it_says_so(machine):
    status, said = machine.run(NO_GPU=1)
    assert status == 2
    assert "no CUDA device" in said
    assert len(said.strip().splitlines()) == 1
    assert not machine.out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--minutes", 0), "above 0"),
        (("--triton-cache", "nowhere"), "no such folder"),
        (("--report-only",), "no check"),
    ],
)
def test_bad_options_are_told(arguments, message, machine):
    status, said = machine.run(*arguments)
    assert status == 2
    assert message in said.splitlines()[-1]


def test_a_part_that_hangs_is_cut_off_with_its_figures(machine):
    status, said = machine.run("--scale", 0.002, HANGS="encoder-tiny")
    assert status == 1, said
    assert "- encoder-tiny: CUT OFF after 1 s, with what it had measured" in machine.report
    assert "- profile: passed" in machine.report
    assert "encoder-tiny" in machine.reports


SCALE = 0.004
"""Of a second: nine minutes are two seconds then."""


def test_what_does_not_fit_is_named(machine):
    start = time.monotonic()
    status, said = machine.run("--minutes", 9, "--scale", SCALE, PART_SECONDS=0.4)
    assert time.monotonic() - start < 540 * SCALE + 3
    assert status in (0, 1), said  # the last part to begin may be cut off
    assert "# GPU check, " in machine.report
    assert ", 9 minutes" in machine.report.splitlines()[0]
    assert "- ops: passed" in machine.report
    assert re.search(r"- minkowski: not begun, \d+ s left, 30 s at least needed", machine.report)
    assert set(machine.reports) < set(PARTS)
    assert "gpu-check.md" in machine.packed()


@pytest.mark.parametrize("begun", [1, 3, 6])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_it_leaves_what_was_measured(number, begun, machine):
    """Early, later, late: while the first, third or sixth part runs."""
    last = PARTS[begun - 1]
    process = machine.start("--minutes", 9, "--scale", 0.1, HANGS=last)
    results = machine.out / f"{last}.json"
    until(lambda: results.exists() and results.stat().st_size and f"{last}: running" in machine.report)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number, out + err
    assert set(machine.reports) == set(PARTS[:begun])
    assert re.findall(rf"- ([\w-]+): CUT OFF by {number.name}", machine.report) == [last]
    assert len(re.findall(rf": not begun, stopped by {number.name}", machine.report)) == len(PARTS) - begun
    assert {f"{part}.json" for part in PARTS[:begun]} <= machine.packed()


def until(condition, seconds: float = 20.0) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_its_files_are_there_and_the_archive_can_be_made(machine):
    process = machine.start(HANGS="encoder-atto")
    until(lambda: (machine.out / "encoder-atto.json").exists() and "encoder-atto: running" in machine.report)
    process.kill()
    process.communicate(timeout=20)
    assert not (machine.out / "gpu-check.tar.gz").exists()
    assert set(machine.reports) == {"ops", "encoder-tiny", "profile"}
    status, said = machine.run("--report-only", NO_GPU=1)
    assert status == 0, said
    assert set(machine.reports) == {"ops", "encoder-tiny", "profile", "encoder-atto"}
    assert "- encoder-atto: running" in machine.report
    assert "- step: planned" in machine.report
    assert "encoder-atto.json" in machine.packed()
    until(lambda: str(machine.python) not in "".join(commands()), 5)  # the part ended with the script


def commands() -> list[str]:
    """Command lines of all processes."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_a_long_log_keeps_its_start_and_end(machine):
    machine.run(LINES_SAID=20_000)
    log = (machine.out / "ops.log").read_text()
    assert len(log) < 700 * 1024
    assert log.startswith("a line of many: 0 ")
    assert log.endswith("the last line\n")
    assert " bytes left out]" in log


def test_a_carried_cache_is_relocated_first_and_taken_by_every_part(machine, tmp_path):
    (tmp_path / "cache").mkdir()
    machine.run("--triton-cache", tmp_path / "cache")
    first, *later = machine.calls.read_text().splitlines()
    assert f"scripts/warm_triton_cache.py --relocate {tmp_path}/cache" in first
    assert all(f" {tmp_path}/cache " in call for call in later)
    assert len(later) == 14


def test_files_of_other_programs_stay(machine):
    machine.out.mkdir()
    (machine.out / "mine.json").write_text("{}")
    (machine.out / "ops.json").write_text("{")
    machine.run()
    assert (machine.out / "mine.json").exists()
    assert "mine.json" not in machine.packed()
    assert "ops" in machine.reports

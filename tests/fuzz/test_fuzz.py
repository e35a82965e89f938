"""The fuzzer for a few seconds, always with the same cases; what it once found; and that it finds what it should.

``make fuzz`` runs it for as long as one likes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_harness import BrokenError, one_line
from fuzz_run import TARGETS

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
COUNT = {"checkpoints": 60, "images": 300, "recipes": 60, "masks": 200, "commands": 200}


def fuzz(*arguments: object) -> dict[str, dict[str, int]]:
    """Counts of each target; fails with what was found."""
    command = [sys.executable, HERE / "fuzz_run.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return {row["target"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_briefly(target: str, tmp_path: Path) -> None:
    counts = fuzz("--targets", target, "--batches", 1, "--count", COUNT[target], "--found", tmp_path)[target]
    assert counts["accepted"] > 5
    assert counts["refused"] > COUNT[target] / 4
    assert counts["accepted"] + counts["refused"] + counts["skipped"] >= 0.9 * COUNT[target]
    assert not list(tmp_path.iterdir())


def test_what_was_found_once() -> None:
    files = {target: [file for file in (CORPUS / target).iterdir() if file.is_file()] for target in TARGETS}
    counts = fuzz(CORPUS)
    for target, cases in files.items():
        assert len(cases) == sum(counts[target][outcome] for outcome in ("accepted", "refused", "skipped")) > 0
        assert max(file.stat().st_size for file in cases) < 50_000


FAULTY = """
import os, sys, time, warnings, ctypes, subprocess
from pathlib import Path
from fuzz_harness import Case, BrokenError, one_line, run_batch

def swell():
    bytearray(60 * 2**20)

def write(path):
    path.with_name("beside").write_text("x")

class Faulty:
    name, seconds, megabytes = "faulty", 2, 30
    ways = dict(
        good=lambda path: None,
        crash=lambda path: ctypes.string_at(0),
        hang=lambda path: sum(iter(int, 1)),
        sleep=lambda path: time.sleep(100),
        swell=lambda path: swell(),
        write=write,
        call=lambda path: subprocess.run(["true"]),
        warn=lambda path: warnings.warn("be careful"),
        say=lambda path: os.write(2, b"be careful"),
        lines=lambda path: one_line("two\\nlines"),
        error=lambda path: {}["missing"],
        exit=lambda path: sys.exit(0),
        last=lambda path: None,
    )
    def produce(self, seed, count, sink):
        for name in self.ways:
            sink(Case(".txt", name.encode(), name))
    def check(self, path):
        self.ways[path.read_text()](path)
        return "accepted"

import fuzz_harness
fuzz_harness.WALL = 2
counts, findings = run_batch(Faulty(), 0, 1)
assert counts["accepted"] + counts["refused"] == len(Faulty.ways), counts
found = {finding.made: finding.what.splitlines()[-1] for finding in findings}
assert all(Path(finding.file).read_text() == finding.made for finding in findings)
fuzz_harness.discard(findings)
print(found)
"""


def test_it_finds_what_it_should() -> None:
    command = [sys.executable, "-c", FAULTY]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = eval(done.stdout)
    words = {
        "crash": "status -11", "hang": "over 2 s", "sleep": "over 2 s", "swell": "grew by ",
        "write": "wrote beside", "call": "subprocess.Popen", "warn": "be careful", "say": "be careful",
        "lines": "no message of one line", "error": "KeyError: 'missing'", "exit": "SystemExit: 0",
    }  # fmt: skip
    assert found.keys() == words.keys()
    for name, word in words.items():
        assert word in found[name], (name, found[name])


@pytest.mark.parametrize("text", ["", "a\nb", "a\x1b[31m", "x" * 2000, "a\u2028b", "not the name"])
def test_what_is_no_message(text: str) -> None:
    with pytest.raises(BrokenError):
        one_line(text, "file.pth")
    one_line("a × b … of file.pth", "file.pth")

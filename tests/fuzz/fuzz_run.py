"""Fuzz for a while, or through a number of batches, or check files again: see ``--help``.

Exit status 1 where something was found. What is found is kept in --found with a text beside it that says how it was
made and what is wrong; ``fuzz_run.py FILE`` checks it again. Files of ``corpus/<target>/`` are cases mended, which
``test_fuzz.py`` checks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process that is forked off one with several threads must start none

from fuzz_harness import OUTCOMES, Finding, Target, discard, keep, run_batch, run_files

HERE = Path(__file__).parent
TARGETS = {
    "checkpoints": ("fuzz_checkpoints", "Checkpoints", 8),
    "images": ("fuzz_images", "Images", 3),
    "recipes": ("fuzz_texts", "Recipes", 1),
    "masks": ("fuzz_texts", "Masks", 0.5),
    "commands": ("fuzz_texts", "Commands", 1),
}
"""Where each is, and its share of the time."""
FIELDS = ("seed", "seconds", *OUTCOMES, "findings")


def say(text: str) -> None:
    """A line at once, also from a process among others."""
    os.write(1, f"{text}\n".encode(errors="backslashreplace"))


def targets(names: list[str]) -> list[Target]:
    """Ready to be forked off."""
    import torch

    torch.set_num_threads(1)
    found = [getattr(importlib.import_module(TARGETS[name][0]), TARGETS[name][1])() for name in names]
    for target in found:
        target.prepare()
    return found


class Board:
    """Numbers of each target that the processes share: the next seed, seconds, cases by outcome, findings."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.memory = mmap.mmap(-1, 8 * len(names) * len(FIELDS))

    def add(self, name: str, field: str, value: float) -> float:
        """Add, and return what was there before. Two processes may lose an addition to one another, never a case."""
        place = 8 * (self.names.index(name) * len(FIELDS) + FIELDS.index(field))
        (before,) = struct.unpack_from("d", self.memory, place)
        struct.pack_into("d", self.memory, place, before + value)
        return float(before)

    def rows(self) -> dict[str, dict[str, float]]:
        return {name: {field: self.add(name, field, 0) for field in FIELDS} for name in self.names}


def work(ready: list[Target], board: Board, until: float, count: int, found: Path, number: int, processes: int) -> None:
    """Batch after batch of the target that is furthest behind its share."""
    while time.monotonic() < until:
        rows = board.rows()
        target = min(ready, key=lambda own: rows[own.name]["seconds"] / TARGETS[own.name][2])
        # Seeds of different processes differ whatever the order in which they are taken.
        seed = int(board.add(target.name, "seed", 1)) * processes + number
        start = time.monotonic()
        board.add(target.name, "seconds", 1)  # so that the next process takes another
        counts, findings = run_batch(target, seed, count)
        board.add(target.name, "seconds", time.monotonic() - start - 1)
        for outcome in OUTCOMES:
            board.add(target.name, outcome, counts[outcome])
        board.add(target.name, "findings", len(findings))
        tell(keep(findings, found), seed)


def tell(findings: object, seed: int) -> None:
    """A line for each finding."""
    for finding in findings:  # type: ignore[attr-defined]
        assert isinstance(finding, Finding)
        last = finding.what.strip().splitlines()[-1][:200]
        say(f"FOUND {finding.target}, seed {seed}: {last} [{finding.made[:80]}] {finding.file}")


def summary(rows: dict[str, dict[str, float]], wall: float) -> None:
    """A line for each target."""
    for name, row in rows.items():
        cases = sum(row[outcome] for outcome in OUTCOMES)
        rate = cases / max(row["seconds"], 1e-9)
        parts = ", ".join(f"{row[outcome]:,.0f} {outcome}" for outcome in OUTCOMES)
        say(f"{name}: {cases:,.0f} tried in {row['seconds']:,.0f} s of processes, {rate:.0f} a second ({parts}), "
            f"{row['findings']:,.0f} findings")  # fmt: skip
    say(f"{wall / 60:.1f} minutes")


def long_run(options: argparse.Namespace) -> bool:
    """Fuzz for ``options.minutes`` from where the last run ended; whether something was found."""
    ready = targets(options.targets)
    board = Board(options.targets)
    state = options.found / "seeds.json"
    seeds = json.loads(state.read_text()) if state.is_file() else {}
    for name in options.targets:
        board.add(name, "seed", seeds.get(name, 0))
    start = time.monotonic()
    until = start + 60 * options.minutes
    children = []
    for number in range(options.processes):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(ready, board, until, options.count, options.found, number, options.processes)
                status = 0
            except KeyboardInterrupt:
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    signal.signal(signal.SIGINT, lambda *_: None)  # the children end, then this process
    failed, told = False, time.monotonic()
    while children:
        time.sleep(0.5)
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                failed |= status != 0
        if time.monotonic() - told > 60 or not children:
            told = time.monotonic()
            rows = board.rows()
            summary(rows, told - start)
            options.found.mkdir(parents=True, exist_ok=True)
            state.write_text(json.dumps(seeds | {name: int(row["seed"]) for name, row in rows.items()}))
    if failed:
        say("a process of the fuzzer ended with an error")
    return failed or any(row["findings"] for row in rows.values())


def batches(options: argparse.Namespace) -> bool:
    """The same batches every time; whether something was found."""
    wrong = False
    for target in targets(options.targets):
        for seed in range(options.batches):
            start = time.monotonic()
            counts, findings = run_batch(target, seed, options.count)
            wrong |= bool(findings)
            tell(keep(findings, options.found), seed)
            say(json.dumps({"target": target.name, **counts, "seconds": round(time.monotonic() - start, 2)}))
    return wrong


def again(options: argparse.Namespace) -> bool:
    """Files that are there, each by the target that its folder or its name begins with."""
    wrong = False
    files = [own for file in options.files for own in (sorted(file.rglob("*")) if file.is_dir() else [file])]
    files = [file.resolve() for file in files if file.is_file() and not file.name.endswith((".report", "seeds.json"))]
    for target in targets(list(options.targets)):
        own = [file for file in files if target.name in (file.parent.name, file.name.split("-")[0])]
        counts, findings = run_files(target, own)
        wrong |= bool(findings)
        for finding in findings:
            say(f"FOUND {finding.target}: {finding.made}\n{finding.what}")
        discard(findings)
        say(json.dumps({"target": target.name, **counts}))
    return wrong


def main() -> None:
    """Parse, fuzz, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="check these files or folders, no others")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batches", type=int, help="instead of minutes, in this process: the same batches every time")
    parser.add_argument("--count", type=int, default=200, help="cases a batch")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--found", type=Path, default=HERE / "found", help="folder for what is found")
    options = parser.parse_args()
    options.found = options.found.absolute()
    mode = again if options.files else long_run if options.batches is None else batches
    sys.exit(int(mode(options)))


if __name__ == "__main__":
    main()

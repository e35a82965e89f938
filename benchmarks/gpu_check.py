"""What `scripts/gpu_check.sh` runs: parity and speed on the GPU of this machine, in the time that there is.

    scripts/gpu_check.sh [folder]                   everything; results in the folder (gpu-check)
    scripts/gpu_check.sh --minutes 9 [folder]       what fits, what matters most first
    scripts/gpu_check.sh --report-only [folder]     report and archive of a check that was killed

Every figure is written when it is measured, the report is rebuilt after each part, and one archive of at most 16 MiB
holds everything at the end, also where the check is stopped. A part that does not fit, fails or is cut off is named in
the report. Status 1 if a part fails or is cut off, 2 where there is no GPU, 128 and the signal's number if stopped.

FULL=1 adds large and huge. PYTHON names the interpreter, PROCESSES how many share the tests (8, or fewer cores).
Nothing but torch, triton, timm, pytest and numpy is needed, and a C compiler, with which Triton builds launchers.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any

import gather

ROOT = Path(__file__).resolve().parents[1]
PYTHON = os.environ.get("PYTHON") or sys.executable
STATE, REPORT, ARCHIVE = "parts.json", "gpu-check", "gpu-check.tar.gz"
ARCHIVE_BYTES, LOG_BYTES, TAIL_BYTES = 16 * 2**20, 512 * 2**10, 64 * 2**10
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
GRACE = 5.0
"""Seconds for a part to end after it is asked to."""
MINKOWSKI_HAS_CUDA = (
    "import sys; from sparse_ops.backends.minkowski.layers import minkowski_engine; "
    "sys.exit(not minkowski_engine().is_cuda_available())"
)


@dataclass(frozen=True)
class Part:
    """Commands that run side by side and end together.

    Args:
        name: of its files in the folder: ``NAME.log`` and, if the command takes ``--json``, ``NAME.json``.
        commands: each one's arguments; those that begin with a script or an option are Python's.
        least: seconds without which it is not begun.
        most: seconds after which it is cut off.
        unless: an excuse where the command ``condition`` fails.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    least: float
    most: float
    condition: tuple[str, ...] = ()
    unless: str = ""


@dataclass
class Outcome:
    """How a part went."""

    name: str
    state: str = "planned"
    seconds: float = 0.0
    said: str = ""

    def line(self) -> str:
        """Of the report."""
        after = f", {self.seconds:.0f} s" if self.seconds else ""
        return f"- {self.name}: {self.state}{after}{f'; {self.said}' if self.said else ''}"


class StoppedError(Exception):
    """A signal came."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def plan(out: Path, triton_cache: Path | None) -> list[Part]:
    """The parts, in the order of what one wants to know first."""
    gpu = ("--device", "cuda", "--dtype", "bfloat16")
    ab = ("triton", "triton+graphs", "triton+compile", "triton-depthwise+compile")

    def bench(name: str, script: str, *options: str, least: float = 30, most: float = 240) -> Part:
        command = (f"benchmarks/{script}", *options, "--json", str(out / f"{name}.json"))
        return Part(name, (command,), least, most)

    def ops(name: str, model: str) -> Part:
        return bench(name, "ops.py", *gpu, "--backend", "triton", "--models", model, "--batch-size", "128", most=180)

    def encoder(name: str, model: str, batch: int, *backends: str, what: str = "encoder") -> Part:
        options = "--what", what, "--models", model, "--batch-size", str(batch), "--backends", *backends
        return bench(name, "encoder.py", *gpu, *options, most=300)

    parts = []
    if triton_cache is not None:
        parts = [Part("triton-cache", (("scripts/warm_triton_cache.py", "--relocate", str(triton_cache)),), 5, 60)]
    parts += [
        ops("ops", "tiny"),
        encoder("encoder-tiny", "tiny", 128, "triton", "triton+graphs"),  # small batches measure launches
        bench("profile", "profile_step.py", "--models", "tiny", "--batch-size", "128", least=20, most=120),
        encoder("encoder-atto", "atto", 128, "triton", "triton+graphs"),
        encoder("encoder-base", "base", 64, *ab),
        encoder("step", "base", 64, *ab, what="step"),
        encoder("encoder-base-256", "base", 256, *ab),
        ops("ops-base", "base"),
        encoder("step-tiny", "tiny", 128, *ab, what="step"),
        Part("backends", (("-m", "sparse_ops"),), 20, 180),
        Part("parity", tuple(parity(processes())), 60, 540),
        sanitizer(),
        bench(
            "finetune",
            "finetune_step.py",
            "--device",
            "cuda",
            "--models",
            "tiny",
            "base",
            "--batch-size",
            "128",
            most=240,
        ),
        Part(
            "minkowski",
            (
                (
                    *("benchmarks/minkowski.py", "--device", "cuda", "--models", "tiny", "--batch-size", "64"),
                    *("--backends", "triton", "--json", str(out / "minkowski.json")),
                ),
            ),
            30,
            120,
            ("-c", MINKOWSKI_HAS_CUDA),
            "MinkowskiEngine is not installed for CUDA",
        ),
    ]
    if os.environ.get("FULL", "0") == "1":  # dense must fit, too
        parts += [encoder(f"encoder-{model}", model, 32, "triton", "triton+graphs") for model in ("large", "huge")]
    return parts


def processes() -> int:
    """That share the tests, since most of their time is spent compiling kernels."""
    return int(os.environ.get("PROCESSES") or min(8, os.cpu_count() or 1))


def parity(count: int) -> Iterator[tuple[str, ...]]:
    """The suite in shards; ``VARIABLE=value`` in front goes to the environment."""
    for number in range(1, count + 1):
        tests = "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", "-m", "cuda", "tests/ops", "tests/models"
        yield f"TEST_SHARD={number}/{count}", *tests


def sanitizer() -> Part:
    """Odd widths under compute-sanitizer, with an allocation a tensor, so that it sees what lies beyond each."""
    tool = "compute-sanitizer"
    options = tool, "--tool", "memcheck", "--error-exitcode", "3", "--print-limit", "20"
    tests = "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", "-m", "cuda", "tests/ops/test_conformance.py"
    command = (
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
        *options,
        PYTHON,
        *tests,
        "-k",
        "triton-cuda and (ragged or uniform or wide)",
    )
    condition = ("-c", f"import shutil, sys; sys.exit(shutil.which({tool!r}) is None)")
    return Part("sanitizer", (command,), 40, 240, condition, f"no {tool} here")


class Log:
    """Keeps the output of a process in a file: all of it up to a size, and the end."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path, show: bool) -> None:
        self.path, self._process, self._show, self.last = path, process, show, ""
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        assert self._process.stdout is not None
        size, tail = 0, b""
        with self.path.open("wb") as file:
            for line in self._process.stdout:
                self.last = line.decode(errors="replace").strip() or self.last
                if self._show:
                    with contextlib.suppress(OSError, ValueError):  # nobody reads any longer; the file has it
                        sys.stdout.write(line.decode(errors="replace"))
                        sys.stdout.flush()
                if size < LOG_BYTES:
                    size += file.write(line[:LOG_BYTES])
                    file.flush()
                else:
                    size, tail = size + len(line), (tail + line)[-TAIL_BYTES:]
            if tail:
                file.write(b"\n[%d bytes left out]\n" % (size - LOG_BYTES - len(tail)) + tail)

    def close(self) -> None:
        """Wait a moment for what is still on its way."""
        self._thread.join(1)


def of_its_own() -> None:
    """In a new process: a group of its own, and an end with the one that began it."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Check:
    """One run of all parts, in a folder."""

    def __init__(self, out: Path, parts: list[Part], minutes: float | None, scale: float) -> None:
        self.out, self.parts, self.minutes, self.scale = out, parts, minutes, scale
        self.outcomes = {part.name: Outcome(part.name) for part in parts}
        whole = float("inf") if minutes is None else minutes * 60 * scale
        self.end = time.monotonic() + whole - min(15.0, 0.04 * whole)  # the rest is for report and archive
        self._running: list[subprocess.Popen[bytes]] = []
        self._starting = False
        self._pending: int | None = None
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path_with_root()}

    def run(self) -> int:
        """All parts that fit; report and archive also where a signal comes."""
        status = 0
        self.keep()
        try:
            for part in self.parts:
                self.part(part)
                self.keep()
        except StoppedError as stop:
            status = 128 + stop.number
            self._stop(GRACE * 0.4 * self.scale)
            for outcome in self.outcomes.values():
                if outcome.state == "running":
                    outcome.state = f"CUT OFF by {stop}"
                elif outcome.state == "planned":
                    outcome.state = f"not begun, stopped by {stop}"
        self.keep()
        archive(self.out, list(self.outcomes))
        print(f"report: {self.out / REPORT}.md; all of it: {self.out / ARCHIVE}", flush=True)
        bad = any(o.state.startswith(("FAILED", "CUT OFF")) for o in self.outcomes.values())
        return status or int(bad)

    def part(self, part: Part) -> None:
        """Run one, if there is time, and note how it ended."""
        outcome, left = self.outcomes[part.name], self.end - time.monotonic()
        if left < part.least * self.scale:
            outcome.state = f"not begun, {max(0.0, left):.0f} s left, {part.least:.0f} s at least needed"
            return
        if part.condition and not self.succeeds(part.condition):
            outcome.state = f"not run, {part.unless}"
            return
        print(f"== {part.name}", flush=True)
        outcome.state, start, limit = "running", time.monotonic(), min(part.most * self.scale, left)
        self.keep()
        logs = [self._begin(part, number, command) for number, command in enumerate(part.commands, 1)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in self._running:
                process.wait(max(0.0, start + limit - time.monotonic()))
        late = any(process.poll() is None for process in self._running)
        codes = [process.returncode for process in self._running]
        self._stop(GRACE * self.scale, signal.SIGINT if part.name == "parity" else signal.SIGTERM)
        for log in logs:
            log.close()
        outcome.seconds = time.monotonic() - start
        failed = [code for code in codes if code]
        outcome.state = f"FAILED, status {failed[0]}" if failed else "passed"
        if late:
            outcome.state = f"CUT OFF after {limit:.0f} s, with what it had measured"
        outcome.said = tests_of(logs) if part.name == "parity" else logs[0].last[:200]

    def _begin(self, part: Part, number: int, command: tuple[str, ...]) -> Log:
        alone = len(part.commands) == 1
        self._starting = True
        process = subprocess.Popen(
            self.argv(command),
            cwd=ROOT,
            env={**self.environment, **dict(w.split("=", 1) for w in command if re.match(r"[A-Z_]+=", w))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=of_its_own,
        )
        self._running.append(process)
        self._starting = False
        if self._pending is not None:
            raise StoppedError(self._pending)
        return Log(process, self.out / (f"{part.name}.log" if alone else f"{part.name}-{number}.log"), alone)

    def argv(self, command: tuple[str, ...]) -> list[str]:
        """Of a command: without variables, and with Python in front of what is Python's."""
        words = [word for word in command if not re.match(r"[A-Z_]+=", word)]
        return [PYTHON, *words] if words[0].startswith("-") or words[0].endswith(".py") else words

    def succeeds(self, command: tuple[str, ...]) -> bool:
        """Whether a command ends well, within two minutes."""
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 120}
        with contextlib.suppress(subprocess.TimeoutExpired):
            return subprocess.run(self.argv(command), cwd=ROOT, env=self.environment, **quiet).returncode == 0
        return False

    def _stop(self, grace: float, how: int = signal.SIGTERM) -> None:
        """End what runs, with its children: asked first, then killed."""
        end = time.monotonic() + max(0.2, grace)
        for number in (how, signal.SIGKILL):
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    if number == signal.SIGKILL or process.poll() is None:
                        os.killpg(process.pid, number)
            for process in self._running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()) if number == how else 5)
        self._running.clear()

    def stop(self, number: int, frame: FrameType | None) -> None:
        """The handler of signals: the first one ends the check, once a process that is being started is known."""
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        if not self._starting:
            raise StoppedError(number)
        self._pending = number

    def keep(self) -> None:
        """Write how the parts stand, and the report."""
        state = {
            "date": f"{date.today()}",
            "minutes": self.minutes,
            "parts": [asdict(o) for o in self.outcomes.values()],
        }
        gather.write_text(self.out / STATE, json.dumps(state, indent=1) + "\n")
        rebuild(self.out)


def path_with_root() -> str:
    """PYTHONPATH with the project in front."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def tests_of(logs: list[Log]) -> str:
    """How many tests of all shards passed, failed and were skipped, and which failed."""
    texts = [log.path.read_text(encoding="utf-8", errors="replace") for log in logs]

    def counted(word: str) -> int:
        found = [re.findall(rf"(\d+) {word}", text.strip().rpartition("\n")[2]) for text in texts]
        return sum(
            int(f[-1]) if f else len(re.findall(rf" {word.upper()}\b", t)) for f, t in zip(found, texts, strict=True)
        )

    failed = sorted({name for text in texts for name in re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)})
    counts = ", ".join(f"{counted(word)} {word}" for word in ("passed", "failed", "skipped"))
    return f"{counts}, in {len(logs)} processes{''.join(f'; {name}' for name in failed[:20])}"


def rebuild(out: Path) -> list[str]:
    """Write the report of what the folder holds; returns the names of its parts."""
    state = json.loads((out / STATE).read_text(encoding="utf-8"))
    outcomes = [Outcome(**part) for part in state["parts"]]
    notes = [outcome.line() for outcome in outcomes]
    reports = {}
    for name in (outcome.name for outcome in outcomes):
        with contextlib.suppress(FileNotFoundError):
            try:
                reports[name] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
            except ValueError as error:
                notes.append(f"- {name}.json cannot be read: {error}")
    within = "" if state["minutes"] is None else f", {state['minutes']:g} minutes"
    gather.write(reports, f"GPU check, {state['date']}{within}", notes, out / f"{REPORT}.md", out / f"{REPORT}.json")
    return [outcome.name for outcome in outcomes]


def belongs(names: list[str]) -> re.Pattern[str]:
    """Names of the files that parts leave."""
    parts = "|".join(map(re.escape, names))
    return re.compile(rf"({parts})(-\d+)?(\.trace)?\.(json|log|json\.gz)|{REPORT}\.(md|json)|{re.escape(STATE)}")


def archive(out: Path, names: list[str]) -> None:
    """Pack the report, results, logs and traces; the largest files are left out where they would be too much."""
    pattern = belongs(names)
    files = sorted((f for f in out.iterdir() if pattern.fullmatch(f.name)), key=lambda file: file.stat().st_size)
    temporary = out / f".{ARCHIVE}.tmp"
    while True:
        with tarfile.open(temporary, "w:gz") as tar:
            for file in files:
                tar.add(file, f"gpu-check/{file.name}")
        if temporary.stat().st_size <= ARCHIVE_BYTES or not files:
            break
        print(f"{files.pop().name} is too large for the archive and stays in {out}")
    temporary.replace(out / ARCHIVE)


def main(argv: list[str] | None = None) -> int:
    """Plan, run, report."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("gpu-check"), help="for results (gpu-check)")
    parser.add_argument("--minutes", type=float, help="time for all of it; without, each part has its own limit alone")
    parser.add_argument("--triton-cache", type=Path, metavar="DIR", help="filled by scripts/warm_triton_cache.py")
    parser.add_argument("--report-only", action="store_true", help="report and archive of what the folder holds")
    parser.add_argument("--scale", type=float, default=1.0, help=argparse.SUPPRESS)  # of the plan's seconds, for tests
    args = parser.parse_args(argv)
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g}: expected a time above 0")
    out, cache = args.folder.resolve(), args.triton_cache and args.triton_cache.resolve()
    if args.report_only:
        if not (out / STATE).exists():
            parser.error(f"{args.folder} holds no check: there is no {STATE}")
        archive(out, rebuild(out))
        print(f"report: {out / REPORT}.md; all of it: {out / ARCHIVE}")
        return 0
    if cache and not cache.is_dir():
        parser.error(f"--triton-cache {args.triton_cache}: no such folder; scripts/warm_triton_cache.py fills one")
    check = Check(out, plan(out, cache), args.minutes, args.scale)
    if not check.succeeds(("-c", "import sys, torch; sys.exit(not torch.cuda.is_available())")):
        parser.exit(2, f"gpu_check: {PYTHON} finds no torch, or torch no CUDA device; PYTHON=... names another\n")
    # Inductor takes another cache in processes that import it, unless one is named.
    check.environment["TRITON_CACHE_DIR"] = str(
        cache or os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    )
    out.mkdir(parents=True, exist_ok=True)
    for file in [f for f in out.iterdir() if belongs(list(check.outcomes)).fullmatch(f.name) or f.name == ARCHIVE]:
        file.unlink()

    for number in SIGNALS:
        signal.signal(number, check.stop)
    return check.run()


if __name__ == "__main__":
    sys.exit(main())

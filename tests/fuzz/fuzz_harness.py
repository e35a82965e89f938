"""Many small cases in a process forked off this one, with limits: what crashes, hangs or swells is told, not suffered.

A case is a file. A target makes cases from a seed and checks one; a batch is all that comes of one seed, in one child.
Where a child dies, the next one makes the same cases and goes on behind the one that killed it.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import mmap
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

OUTCOMES = ("accepted", "refused", "skipped")
WALL = 15
"""Times the seconds of processor that a case may take, it may take by the clock: other programs run here, too."""
SPACE = 4 * 2**30
"""Bytes of addresses that a child may add to those of this process: what is more was asked for, not needed."""
LONGEST = 1000
"""Letters of a message."""


class BrokenError(AssertionError):
    """A property that does not hold."""


@dataclass(frozen=True)
class Case:
    """A file to be: its suffix, what is in it, and how it was made."""

    suffix: str
    content: bytes
    made: str


@dataclass(frozen=True)
class Finding:
    """A case that a property does not hold for."""

    target: str
    made: str
    what: str
    file: str = ""

    @property
    def kind(self) -> str:
        """The same for the same fault, more or less: the last line without numbers and names, and where it was."""
        places = re.findall(r'File "[^"]*/([^"/]+)", line (\d+)', self.what)
        last = self.what.strip().splitlines()[-1]
        last = re.sub(r"case\.\w+|\d+|'[^']*'|\"[^\"]*\"", "*", last)[:80]
        return f"{last} {places[-1] if places else ''}"


class Target(Protocol):
    """What is fuzzed. Errors of :meth:`check` are findings."""

    name: str
    seconds: float
    """Of processor time that a case may take."""
    megabytes: int
    """That this process may grow by, at its largest, in a case."""

    def prepare(self) -> None:
        """Import and build what children share."""

    def produce(self, seed: int, count: int, sink: Callable[[Case], None]) -> None:
        """Give ``count`` cases or so to ``sink``; the same for the same seed."""

    def check(self, path: Path) -> str:
        """One of :data:`OUTCOMES`; raises where a property does not hold. ``path.parent / "out"`` may be written."""


def one_line(text: str, *names: str) -> None:
    """Raise BrokenError unless a message is one line, of sensible length, without control characters, and names."""
    if not text.strip() or len(text.splitlines()) != 1 or len(text) > LONGEST or not text.isprintable():
        raise BrokenError(f"no message of one line: {text[:2000]!r}")
    for name in names:
        if name not in text:
            raise BrokenError(f"a message that does not name {name}: {text!r}")


def _forbidden(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else "w" in (mode or "")
        null = isinstance(path, int) or str(path) == os.devnull
        return bool(writes) and not null and f"{os.sep}out" not in str(path)
    if event in ("os.mkdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.rmdir", "os.chmod", "os.truncate"):
        # torch makes a folder of its own for temporary files when its compiler is first imported.
        return not any(word in str(argument) for argument in arguments for word in (f"{os.sep}out", "torchinductor"))
    return event.startswith(
        ("pickle.find_class", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.system", "socket.")
    )


class _Child:
    """In the forked process: runs cases, counts them in shared memory, writes what it finds to a file."""

    def __init__(self, target: Target, first: int, folder: Path, shared: mmap.mmap) -> None:
        self.target, self.first, self.folder, self.shared = target, first, folder, shared
        self.number = 0
        self.events: list[str] = []
        self.watching = False
        self.findings = (folder / "findings").open("a")
        self.log = (folder / "log").open("w+")

    def limit(self) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + SPACE, used + SPACE))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, 2**26))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(self.log.fileno(), 1)
        os.dup2(self.log.fileno(), 2)
        faulthandler.enable(self.log)
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
            faulthandler.register(number, self.log, all_threads=False, chain=True)
        sys.addaudithook(self._watch)

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.watching and _forbidden(event, arguments):
            self.events.append(f"{event} {str(arguments)[:200]}")

    def run(self, case: Case) -> None:
        self.number += 1
        if self.number > self.first:
            try:
                self._run(case)
            except BaseException:  # or hypothesis would take it for a finding and look for a smaller one
                traceback.print_exc()
                os._exit(70)

    def _run(self, case: Case) -> None:
        path = self.folder / "case" / f"case{case.suffix}"
        path.write_bytes(case.content)
        (self.folder / "made").write_text(case.made)
        struct.pack_into("q", self.shared, 0, self.number)
        outcome, what = self.checked(path)
        if what:
            kept = self.folder / f"{self.number}{case.suffix}"
            path.replace(kept)
            found = Finding(self.target.name, case.made, what, str(kept))
            self.findings.write(json.dumps(asdict(found)) + "\n")
            self.findings.flush()
        path.unlink(missing_ok=True)
        place = 8 * (1 + OUTCOMES.index(outcome))
        struct.pack_into("q", self.shared, place, struct.unpack_from("q", self.shared, place)[0] + 1)

    def checked(self, path: Path) -> tuple[str, str]:
        """The outcome, and what is wrong."""
        os.ftruncate(self.log.fileno(), 0)
        os.lseek(self.log.fileno(), 0, os.SEEK_SET)
        self.events.clear()
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmRSS")
        signal.setitimer(signal.ITIMER_PROF, self.target.seconds)
        signal.setitimer(signal.ITIMER_REAL, self.target.seconds * WALL)
        outcome, problems = "refused", []
        self.watching = True
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always", append=True)  # what users see, again and again
                outcome = self.target.check(path)
            problems += [f"warning: {warning.message}" for warning in warned]
        except BaseException:
            problems.append(traceback.format_exc())
        self.watching = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        grown = (_memory("VmHWM") - before) / 1024
        problems += self.events
        if grown > self.target.megabytes:
            problems.append(f"grew by {grown:.0f} MB")
        sys.stdout.flush()
        sys.stderr.flush()
        if os.fstat(self.log.fileno()).st_size:
            problems.append(f"said: {(self.folder / 'log').read_text(errors='replace')[:2000]}")
        written = [file.name for file in path.parent.iterdir() if file.name not in (path.name, "out")]
        problems += [f"wrote {name}" for name in written]
        for extra in (*written, "out"):
            shutil.rmtree(path.parent / extra, ignore_errors=True)
            if (path.parent / extra).is_file():
                (path.parent / extra).unlink()
        return outcome, "\n".join(problems)


def _memory(name: str) -> int:
    """Kilobytes of this process now (VmRSS), or at most since that was last reset (VmHWM)."""
    found = re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def run_batch(target: Target, seed: int, count: int) -> tuple[dict[str, int], list[Finding]]:
    """How many cases had which outcome, and what was found; the files lie in a temporary folder until :func:`keep`
    takes them."""
    return _run(target, lambda sink: target.produce(seed, count, sink))


def run_files(target: Target, files: list[Path]) -> tuple[dict[str, int], list[Finding]]:
    """The same of files that are there."""

    def produce(sink: Callable[[Case], None]) -> None:
        for file in files:
            sink(Case(file.suffix, file.read_bytes(), file.name))

    return _run(target, produce)


def _run(target: Target, produce: Callable[[Callable[[Case], None]], None]) -> tuple[dict[str, int], list[Finding]]:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    (folder / "case").mkdir()
    shared = mmap.mmap(-1, 8 * (1 + len(OUTCOMES)))
    findings: list[Finding] = []
    first = 0
    while True:
        process = os.fork()
        if process == 0:
            _live(target, first, folder, shared, produce)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status == 0:
            break
        first = struct.unpack_from("q", shared)[0]
        log = (folder / "log").read_text(errors="replace")[-4000:]
        kept = folder / f"{first}-killed"
        for file in (folder / "case").glob("case*"):
            kept = folder / f"{first}{file.suffix}"
            file.replace(kept)
        shutil.rmtree(folder / "case")
        (folder / "case").mkdir()
        slow = status in (-signal.SIGPROF, -signal.SIGALRM)
        reason = f"over {target.seconds} s" if slow else f"the process ended with status {status}"
        made = (folder / "made").read_text()
        findings.append(Finding(target.name, made, f"{log}\n{reason}", str(kept)))
        if status > 0:
            raise RuntimeError(f"the fuzzer itself failed: {log}")
    killed = len(findings)
    lines = (folder / "findings").read_text().splitlines()
    findings += [Finding(**json.loads(line)) for line in lines]
    counts = {name: struct.unpack_from("q", shared, 8 * (1 + i))[0] for i, name in enumerate(OUTCOMES)}
    counts["refused"] += killed
    if not findings:
        shutil.rmtree(folder)
    return counts, findings


def _live(
    target: Target, first: int, folder: Path, shared: mmap.mmap, produce: Callable[[Callable[[Case], None]], None]
) -> None:
    """The child; never returns."""
    status = 1
    try:
        os.chdir(folder / "case")
        gc.freeze()
        child = _Child(target, first, folder, shared)
        child.limit()
        produce(child.run)
        status = 0
    except BaseException as error:  # of hypothesis's, with all that it could have drawn
        sys.stderr.write(f"{''.join(traceback.format_tb(error.__traceback__))}{type(error)}: {str(error)[:2000]}\n")
    sys.stderr.flush()
    os._exit(status)


def keep(findings: list[Finding], folder: Path, most: int = 3) -> Iterator[Finding]:
    """Move files into ``folder``, with a text beside each; of one kind of finding not more than ``most``."""
    folder.mkdir(parents=True, exist_ok=True)
    for finding in findings:
        name = f"{finding.target}-{_digest(finding.kind)}"
        numbers = [number for number in range(most) if not list(folder.glob(f"{name}-{number}.*"))]
        source = Path(finding.file)
        if not numbers:
            yield Finding(finding.target, finding.made, finding.what, f"like {name}")
        else:
            file = folder / f"{name}-{numbers[0]}{source.suffix}"
            if source.exists():
                shutil.copy(source, file)
            file.with_name(file.name + ".report").write_text(f"{finding.made}\n{finding.what}\n")
            yield Finding(finding.target, finding.made, finding.what, str(file))
    discard(findings)


def discard(findings: list[Finding]) -> None:
    """Remove the temporary folders that files of findings lie in."""
    for parent in {Path(finding.file).parent for finding in findings}:
        if parent.name.startswith("fuzz-"):
            shutil.rmtree(parent, ignore_errors=True)


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]

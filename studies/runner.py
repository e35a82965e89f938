"""Doing the parts of a study, each once, by one runner or several."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convnextv2.files import write_json
from convnextv2.messages import one_line
from convnextv2.training import RunStoppedError
from convnextv2.training.processes import only_run_in
from studies.parts import Part
from studies.work import do, tidy

PAUSE = 2.0
"""Seconds between looks at parts that another runner does."""


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none, or none that is whole."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None


def record_of(part: Part, folder: Path) -> dict[str, Any] | None:
    """What came of a part that is done; of one that is not, or whose record is damaged, None."""
    record = read_json(part.place(folder) / "result.json") or {}
    found = record.get("result")
    number = found.get("loss" if part.kind == "pretrain" else "top1") if isinstance(found, dict) else None
    return record if isinstance(number, int | float) and isinstance(record.get("seconds"), int | float) else None


def run(parts: Sequence[Part], folder: Path, say: Callable[[str], None], probes: int, **free: Any) -> int:
    """Do all parts that are not done; what each starts from stands before it.

    Args:
        parts: of the study.
        folder: of the study, which may have other runners.
        say: takes lines for the user.
        probes, free: as :func:`~studies.work.do`.

    Returns:
        How many parts could not be done; the errors are in ``error.json`` in their folders.

    Raises:
        RunStoppedError: after SIGINT or SIGTERM.
        OSError: if the folder cannot be written.
    """
    failed, waiting = set[str](), list(parts)
    while waiting:
        later = list[Part]()
        for part in waiting:
            if part.needs and part.needs.key in failed:
                failed.add(part.key)
                say(f"{part}: left out, for {part.needs} failed")
                continue
            ready = part.needs is None or record_of(part.needs, folder) is not None
            done = _attempt(part, folder, say, probes, free) if ready else None
            if done is None:
                later.append(part)
            elif not done:
                failed.add(part.key)
        if len(later) == len(waiting):
            time.sleep(PAUSE)  # another runner is at what is left, or at what that needs
        waiting = later
    return len(failed)


def _attempt(part: Part, folder: Path, say: Callable[[str], None], probes: int, free: dict[str, Any]) -> bool | None:
    """Whether a part is done now; None while another runner is at it."""
    place = part.place(folder)
    place.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(only_run_in(place))
        except ValueError:
            return None
        if record_of(part, folder) is not None:
            return True
        say(f"{part} …")
        try:
            record = do(part, folder, probes, **free)
            write_json(place / "result.json", record)
        except RunStoppedError:
            raise
        except Exception as error:  # whatever it is, the other parts are to be done
            reason = one_line(error) or type(error).__name__
            say(f"{part}: failed: {reason}")
            with contextlib.suppress(OSError):  # of a full disk
                write_json(place / "error.json", {"error": reason, "kind": type(error).__name__})
            return False
        (place / "error.json").unlink(missing_ok=True)
        tidy(part, folder)
        found = record["result"]
        came_to = f"top-1 {found['top1']:.1f} %" if "top1" in found else f"loss {found['loss']:.4f}"
        say(f"{part}: {came_to}, {record['session_seconds']:.0f} s")
        return True


def state_of(part: Part, folder: Path) -> str:
    """What a part is at the moment: done, running, failed or open."""
    if record_of(part, folder) is not None:
        return "done"
    place = part.place(folder)
    if place.is_dir():
        try:
            with only_run_in(place):
                pass
        except ValueError:
            return "running"
    return "failed" if (place / "error.json").is_file() else "open"


def status(parts: Sequence[Part], folder: Path) -> list[str]:
    """Lines: how many parts of each kind are in which state, errors, time spent and time that the rest may take."""
    states = {part.key: state_of(part, folder) for part in parts}
    lines, spent, left, unknown = list[str](), 0.0, 0.0, list[str]()
    for kind in dict.fromkeys(part.kind for part in parts):
        these = [part for part in parts if part.kind == kind]
        counts = Counter(states[part.key] for part in these)
        lines.append(f"{kind}: " + ", ".join(f"{number} {state}" for state, number in sorted(counts.items())))
        records = [(part.work, record) for part in these if (record := record_of(part, folder))]
        work = sum(one for one, _ in records)
        seconds = sum(max(record["seconds"], record.get("session_seconds", 0)) for _, record in records)
        spent += seconds
        rest = sum(part.work for part in these if states[part.key] != "done")
        if rest and not work:
            unknown.append(kind)
        left += rest * seconds / work if work else 0
    for part in parts:
        if states[part.key] == "failed":
            lines.append(f"{part}: {(read_json(part.place(folder) / 'error.json') or {}).get('error')}")
    more = f", and {' and '.join(unknown)}, of which none is done yet" if unknown else ""
    return [*lines, f"spent {_time(spent)}, left about {_time(left)} of one runner{more}"]


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{seconds / 60:.1f} min"

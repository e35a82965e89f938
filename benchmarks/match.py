"""Contenders against dense networks: they agree, are timed in turns, and leave their results as they come."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from common import Contender, compare, first_line, synchronise, warm_up
from torch import Tensor


@dataclass
class Result:
    """One line of the table. Times are of the forward and backward pass of one batch, per image."""

    model: str
    what: str
    backend: str
    ms_per_image: float | None = None
    ms_per_image_min: float | None = None
    ms_per_image_max: float | None = None
    images_per_s: float | None = None
    activation_mb: float | None = None
    """Peak above what is allocated before; with CUDA graphs the memory pools that they reserve, and the peak beside."""
    speedup: float | None = None
    speedup_min: float | None = None
    speedup_max: float | None = None
    memory_ratio: float | None = None
    flop_utilisation: float | None = None
    """Multiply-adds of the visible cells, forward and backward, twice that in FLOP, over what the device could do."""
    error: float | None = None
    against: str | None = None
    """The dense network that ratios are taken against, and why another one is not."""
    note: str | None = None
    """Why there is no ratio."""
    provisional: bool | None = None
    """Of a single pass, before all contenders took their turns."""
    times_ms: list[float] = field(default_factory=list)


Plan = dict[str, Callable[[], Contender]]
"""Contenders by name, each made when its turn comes: compiling one may fail, or take all the time there is."""


def peak_activation_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Peak of the memory that ``run`` allocates through torch, in bytes, above what is allocated before.

    Gradients of parameters must exist already, so that they do not count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def graph_pool_bytes(device: torch.device) -> int:
    """Memory that CUDA graphs hold in pools of their own, in bytes."""
    if device.type != "cuda":
        return 0
    return sum(
        s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)
    )


class Match:
    """Contenders that join one after another, agree, and are timed in turns; one that fails leaves a note.

    Args:
        plan: the contenders, in the order of the table; dense ones have names that begin with "dense".
        row: an empty result for a contender's name.
        told: receives the results so far, in the order of the table, whenever something has been measured.
    """

    def __init__(
        self, args: argparse.Namespace, plan: Plan, row: Callable[[str], Result], told: Callable[[list[Result]], None]
    ) -> None:
        self.args, self.device, self._plan, self._row, self._told = args, torch.device(args.device), plan, row, told
        self.ready: dict[str, Contender] = {}
        self.rows: dict[str, Result] = {}
        self._memory: dict[str, float] = {}
        self._errors: dict[str, float | None] = {}
        self._expected: list[Tensor] | None = None

    def run(self) -> list[Result]:
        """All of it; what is compiled comes last, as that takes longest."""
        for name in sorted(self._plan, key=compiling):
            if self._expected is None and not name.startswith("dense"):
                self._join(*(n for n in self._plan if n.startswith("dense") and n not in self.rows))
            self._join(name)
        self._turns(list(self.ready.values()), self.args.repeats)
        self._write(provisional=None)
        return self.results()

    def results(self) -> list[Result]:
        """So far."""
        return [self.rows[name] for name in self._plan if name in self.rows]

    def _join(self, *names: str) -> None:
        for name in (n for n in names if n not in self.rows):
            self.rows[name] = self._row(name)
            try:
                self.rows[name].note = self._made_ready(name)
            except Exception as failure:  # a compiler's or the device's, for want of memory, say
                self._drop(name, failure)
            if name in self.ready:
                self._turns([c for n, c in self.ready.items() if n == name or n.startswith("dense")], 1)
            self._write(provisional=True)

    def _made_ready(self, name: str) -> str | None:
        """Why it is left out, or None."""
        pools = graph_pool_bytes(self.device)
        contender = self._plan[name]()
        if self._expected is None and name.startswith("dense"):
            self._expected, self._errors[name] = contender.values(), None
        elif self._expected is None:
            return "no dense network ran that it could be compared with"
        else:
            error, failure = compare(contender, self._expected, self.args.dtype)
            if failure is not None:
                return failure
            self._errors[name] = error
        warm_up(contender, self.args.warmup)
        contender.clear(keep=True)
        held = graph_pool_bytes(self.device) - pools
        self._memory[name] = held + peak_activation_bytes(contender.run, self.device)
        self.ready[name] = contender
        return None

    def _drop(self, name: str, failure: Exception) -> None:
        self.ready.pop(name, None)
        self.rows[name] = self._row(name)
        self.rows[name].note = first_line(failure)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _turns(self, contenders: list[Contender], rounds: int) -> None:
        for contender in contenders:
            contender.times_ms.clear()
        for _ in range(rounds):
            for contender in contenders:
                if contender.name in self.ready:
                    self._time(contender)

    def _time(self, contender: Contender) -> None:
        try:
            contender.time(self.device)
        except Exception as failure:
            self._drop(contender.name, failure)

    def _write(self, provisional: bool | None) -> None:
        """Bring the rows of contenders that have just been timed up to date."""
        rivals = {n: c for n, c in self.ready.items() if n.startswith("dense")}
        best = min(rivals.values(), key=lambda c: statistics.median(c.times_ms), default=None)
        lost = [f"{n}: {r.note}" for n, r in self.rows.items() if n.startswith("dense") and r.note is not None]
        for name, contender in self.ready.items():
            row = self.rows[name]
            times = [t / self.args.batch_size for t in contender.times_ms]
            row.ms_per_image, row.ms_per_image_min, row.ms_per_image_max = (
                statistics.median(times),
                min(times),
                max(times),
            )
            row.images_per_s = 1e3 / row.ms_per_image
            row.activation_mb, row.error = self._memory[name] / 2**20, self._errors[name]
            row.times_ms, row.provisional = list(contender.times_ms), provisional
            row.speedup = row.speedup_min = row.speedup_max = row.memory_ratio = row.against = None
            if best is not None and not name.startswith("dense"):
                ratios = [d / t for d, t in zip(best.times_ms, contender.times_ms, strict=False)]
                row.speedup, row.speedup_min, row.speedup_max = statistics.median(ratios), min(ratios), max(ratios)
                row.memory_ratio = self._memory[name] / self._memory[best.name]
                row.against = "; not ".join([best.name, *lost])
        self._told(self.results())


def compiling(name: str) -> int:
    """How late a contender is made: those that are compiled after those that are not, the last rival last."""
    return 3 if name == "dense-compiled+graphs" else 2 if "+" in name else int(name == "dense-compiled")

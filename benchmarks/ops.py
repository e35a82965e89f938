"""Each kernel of a backend against its floor, against dense, and against densify, convolve, gather.

For the depthwise convolution the floor is the larger of two times: the bytes that must move (features read once,
results written once) over the bandwidth of a copy measured in the same run, and the multiply-adds of taps that lie on
visible cells over the float32 rate of the device. For the pointwise half of a block it is the larger of the bytes and
of its matrix products at the rate of a large one in that dtype. ``of floor`` is the floor over the time, 100 % being
perfect. Dense is torch's (cuDNN's) operation on every cell of the same images; its results are compared. Where they
differ, or a kernel fails, the result says so and has no ratio, the others are measured all the same, and the status is
2 at the end. The JSON is written after each result.

    python benchmarks/ops.py --device cuda --dtype bfloat16 --models tiny base --batch-size 128 --json ops.json
    python benchmarks/ops.py --models atto --batch-size 8
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    DTYPES,
    add_options,
    check_options,
    first_line,
    hardware,
    print_head,
    relative_error,
    same_arithmetic,
    synchronise,
    write_report,
)
from torch import Tensor

from convnextv2.models.config import encoder_config
from convnextv2.models.masking import keep_count, random_mask
from sparse_ops import ActiveSet, Backend, BackendUnavailableError, DenseGrid, MLPWeights, convnext_mlp, resolve_backend
from sparse_ops.oracle import MaskedDenseGrid

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
KERNEL = 7
EPS = 1e-6


@dataclass
class Result:
    """One kernel at one stage; times in microseconds, of one call."""

    model: str
    stage: int
    channels: int
    what: str
    us: float | None = None
    floor_us: float | None = None
    bound: str | None = None
    of_floor: float | None = None
    dense_us: float | None = None
    against_dense: float | None = None
    gathered_us: float | None = None
    error: float | None = None
    note: str | None = None
    """Why there is no ratio."""
    times_us: list[float] = field(default_factory=list)


class Clock:
    """Times calls on a device: each from cold caches on CUDA, in turns, as medians."""

    def __init__(self, device: torch.device, repeats: int, warmup: int) -> None:
        self.device, self.repeats, self.warmup = device, repeats, warmup
        # Written between calls, so that nothing is left in the last-level cache.
        self.flush = torch.empty(64 * 2**20, dtype=torch.int32, device=device) if device.type == "cuda" else None

    def __call__(self, *calls: Callable[[], object]) -> list[list[float]]:
        """Times of each of ``calls`` in microseconds."""
        for call in calls:
            for _ in range(self.warmup):
                call()
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(self.repeats):
            for call, found in zip(calls, times, strict=True):
                found.append(self._once(call))
        return times

    def _once(self, call: Callable[[], object]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        self.flush.zero_()
        torch.cuda._sleep(6_000_000)  # about three milliseconds, in which all launches of the call are queued
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        synchronise(self.device)
        return begin.elapsed_time(end) * 1e3


@dataclass(frozen=True)
class Rates:
    """What the device does in this run: bytes a second of a copy (read and written), FLOP a second of products."""

    copy: float
    float32: float
    products: float

    @classmethod
    def measure(cls, clock: Clock, dtype: torch.dtype) -> Rates:
        device = clock.device
        large = device.type == "cuda"
        source = torch.empty((512 if large else 64) * 2**20, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        side = 8192 if large else 1024
        a32, b32 = (torch.randn(side, side, device=device) for _ in range(2))
        a, b = a32.to(dtype), b32.to(dtype)
        times = clock(lambda: target.copy_(source), lambda: a32 @ b32, lambda: a @ b)
        copied, wide, narrow = (statistics.median(found) * 1e-6 for found in times)
        return cls(2 * source.numel() / copied, max(2 * side**3 / wide, vector_rate(device)), 2 * side**3 / narrow)


def vector_rate(device: torch.device) -> float:
    """Float32 FLOP a second of a GPU's ordinary units by its highest clock, 0 where nobody tells that."""
    if device.type != "cuda":
        return 0.0
    properties = torch.cuda.get_device_properties(device)
    lanes = 64 if (properties.major, properties.minor) == (8, 0) else 128
    return 2.0 * lanes * properties.multi_processor_count * (clock_hz(properties) or 0.0)


def clock_hz(properties: Any) -> float | None:
    """Of torch's properties of a device, else of nvidia-smi: CUDA 13 took the clock out of the properties."""
    if getattr(properties, "clock_rate", 0):
        return properties.clock_rate * 1e3
    query = ["nvidia-smi", f"--id=GPU-{properties.uuid}", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout) * 1e6
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return None


def visible_taps(active: ActiveSet) -> int:
    """Taps of a 7×7 kernel that lie on visible cells, over all active cells."""
    return int((active.cell_neighbours(KERNEL) < active.num_cells).sum())


Measurement = Callable[[], Result]


class Measured:
    """Takes results one by one; what fails becomes one that says so.

    Args:
        told: called with each result.
    """

    def __init__(self, args: argparse.Namespace, clock: Clock, told: Callable[[Result], None]) -> None:
        self.args, self.clock, self.told = args, clock, told

    def __call__(self, stage: Stage, whats: tuple[str, ...], measurements: Callable[[], Iterator[Measurement]]) -> None:
        """Make the ``measurements``, which are those of ``whats``, one by one, and tell their results.

        Raises:
            RuntimeError: if the device serves nobody any longer.
        """
        left = list(whats)
        try:
            for measurement in measurements():
                self._tell(stage, left[:1], measurement)
                del left[0]
        except Exception as failure:  # before there was anything to measure
            self._failed(stage, left, failure)

    def _tell(self, stage: Stage, what: list[str], measurement: Measurement) -> None:
        try:
            self.told(measurement())
        except Exception as failure:  # a compiler's or the device's; the other kernels are measured all the same
            self._failed(stage, what, failure)

    def _failed(self, stage: Stage, whats: list[str], failure: Exception) -> None:
        for what in whats:
            self.told(Result(stage.model, stage.number, stage.channels, what, note=first_line(failure)))
        synchronise(self.clock.device)  # raises if it was an illegal address, say
        if self.clock.device.type == "cuda":
            torch.cuda.empty_cache()


DEPTHWISE = "depthwise", "depthwise, grad of x", "depthwise, grad of weight"
POINTWISE = "pointwise half", "pointwise half, gradients"


def depthwise(args: argparse.Namespace, clock: Clock, rates: Rates, stage: Stage) -> Iterator[Measurement]:
    """Forward, gradient for the input, gradient for the weight."""
    active, backend, dtype = stage.active, args.kernels, DTYPES[args.dtype]
    backend.prepare(active, KERNEL)
    rows, channels = active.num_cells, stage.channels
    x, grad = (torch.randn(rows, channels, device=clock.device).to(dtype) for _ in range(2))
    weight = torch.randn(channels, 1, KERNEL, KERNEL, device=clock.device).to(dtype)
    bias = torch.randn(channels, device=clock.device).to(dtype)
    dense_x, dense_grad = (active.densify(t).permute(0, 3, 1, 2) for t in (x, grad))

    def dense_backward(mask: tuple[bool, bool, bool]) -> Tensor:
        found = torch.ops.aten.convolution_backward(
            dense_grad, dense_x, weight, [channels], [1, 1], [KERNEL // 2] * 2, [1, 1], False, [0, 0], channels, mask
        )
        return next(tensor for tensor in found if tensor is not None)

    def dense_forward(x: Tensor = dense_x) -> Tensor:
        return F.conv2d(x, weight, bias, padding=KERNEL // 2, groups=channels)

    def gathered() -> Tensor:
        return active.gather(dense_forward(active.densify(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    calls: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor] | None]] = {
        "depthwise": (partial(backend.depthwise, x, weight, bias, active, reverse_taps=False), dense_forward, gathered),
        "depthwise, grad of x": (
            partial(backend.depthwise, grad, weight, None, active, reverse_taps=True),
            partial(dense_backward, (True, False, False)),
            None,
        ),
        "depthwise, grad of weight": (
            partial(backend.depthwise_weight_grad, x, grad, active, KERNEL),
            partial(dense_backward, (False, True, False)),
            None,
        ),
    }
    move = 2 * rows * channels * x.element_size() / rates.copy
    compute = 2 * visible_taps(active) * channels / rates.float32

    def measure(what: str) -> Result:
        ours, dense, other = calls[what]
        expected = dense()
        if what != "depthwise, grad of weight":
            expected = active.gather(expected.permute(0, 2, 3, 1))
        error = relative_error([ours()], [expected])
        times = clock(ours, dense, *([other] if other else []))
        return stage.result(what, move, compute, times, error, args.dtype)

    for what in calls:
        yield partial(measure, what)


def pointwise(args: argparse.Namespace, clock: Clock, rates: Rates, stage: Stage) -> Iterator[Measurement]:
    """LayerNorm to projection, forward and backward: the backend's, and separate operations on every cell."""
    active, backend, dtype = stage.active, args.kernels, DTYPES[args.dtype]
    channels, hidden = stage.channels, 4 * stage.channels
    mixed = backend.fuses_mlp(clock.device, dtype, torch.float32)

    def pair(*shape: int) -> tuple[Tensor, Tensor]:
        scale = shape[1] ** -0.5 if len(shape) > 1 else 1.0
        first, second = torch.randn(shape, device=clock.device) * scale, torch.randn(shape[0], device=clock.device)
        return first.to(dtype).requires_grad_(), second.to(dtype).requires_grad_()

    norm, pwconv1, grn, pwconv2 = pair(channels), pair(hidden, channels), pair(hidden), pair(channels, hidden)
    leaves = [*norm, *pwconv1, *grn, *pwconv2]
    # As under autocast, where the backend takes that: the parameters are float32.
    own = [leaf.detach().float().requires_grad_() if mixed else leaf for leaf in leaves]
    keep = torch.zeros(active.batch_size, *active.grid_size, dtype=torch.bool, device=clock.device)
    keep[tuple(active.patch_coordinates.unbind(1))] = True
    dense_grid: DenseGrid = MaskedDenseGrid(keep, active.side, dtype=dtype)
    x = torch.randn(active.num_cells, channels, device=clock.device).to(dtype).requires_grad_()
    grad = torch.randn(active.num_cells, channels, device=clock.device).to(dtype)
    dense_x, dense_grad = active.densify(x.detach()).requires_grad_(), active.densify(grad)

    def fused() -> Tensor:
        with torch.autocast(clock.device.type, dtype, enabled=mixed and dtype != torch.float32):
            return convnext_mlp(x, MLPWeights(*own), active.row_offsets, backend, workspace=active.workspace)

    def separate() -> Tensor:
        h = F.gelu(F.linear(F.layer_norm(dense_x, [channels], *norm, EPS), *pwconv1))
        return F.linear(dense_grid.grn(h, *grn, EPS), *pwconv2)

    size, cells = x.element_size(), active.num_cells
    products = 2 * 2 * cells * channels * hidden / rates.products

    def measure(what: str, numbers: int, factor: int, backward: bool) -> Result:
        """``numbers`` a cell are read or written; the products are ``factor`` times those of the forward pass."""
        ours, theirs = fused(), separate()
        our_grads = torch.autograd.grad(ours, [x, *own], grad, retain_graph=True)
        their_grads = list(torch.autograd.grad(theirs, [dense_x, *leaves], dense_grad, retain_graph=True))
        their_grads[0] = active.gather(their_grads[0])
        error = relative_error([ours, *our_grads], [active.gather(theirs), *their_grads])
        if backward:
            times = clock(
                lambda: torch.autograd.grad(ours, [x, *own], grad, retain_graph=True),
                lambda: torch.autograd.grad(theirs, [dense_x, *leaves], dense_grad, retain_graph=True),
            )
        else:
            times = clock(fused, separate)
        return stage.result(what, cells * numbers * size / rates.copy, factor * products, times, error, args.dtype)

    # The hidden layer is written once and read twice, before and after the norms are known.
    yield partial(measure, POINTWISE[0], 2 * channels + 3 * hidden, 1, False)
    yield partial(measure, POINTWISE[1], 3 * channels + 2 * hidden, 2, True)


@dataclass(frozen=True)
class Stage:
    """A stage of a network on an active set."""

    model: str
    number: int
    channels: int
    active: ActiveSet

    def __str__(self) -> str:
        return f"{self.model}, stage {self.number}"

    def result(
        self, what: str, move: float, compute: float, times: list[list[float]], error: float, dtype: str
    ) -> Result:
        """``move`` and ``compute`` are the two floors in seconds; ``times`` are ours, dense, and perhaps gathered."""
        ours, dense, *gathered = (statistics.median(found) for found in times)
        agrees = error <= TOLERANCE[dtype]
        floor = max(move, compute) * 1e6
        return Result(
            model=self.model,
            stage=self.number,
            channels=self.channels,
            what=what,
            us=ours,
            floor_us=floor,
            bound="bytes" if move > compute else "arithmetic",
            of_floor=floor / ours,
            dense_us=dense,
            against_dense=dense / ours if agrees else None,
            gathered_us=gathered[0] if gathered else None,
            error=error,
            note=None if agrees else f"results differ from dense by {error:.1e}",
            times_us=times[0],
        )


def stages(args: argparse.Namespace, name: str) -> list[Stage]:
    """The stages of a variant, on one random mask."""
    device = torch.device(args.device)
    grid_size = args.img_size[0] // 32, args.img_size[1] // 32
    patches = grid_size[0] * grid_size[1]
    mask = random_mask(args.batch_size, patches, args.mask_ratio, device=device)
    active = ActiveSet.from_mask(mask, grid_size, keep=keep_count(patches, args.mask_ratio))
    found = []
    for number, channels in enumerate(encoder_config(name).dims, start=1):
        found.append(Stage(name, number, channels, active))
        active = active.down() if active.side > 1 else active
    return [stage for stage in found if stage.number in args.stages]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ["tiny", "base"])
    parser.set_defaults(repeats=20, warmup=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4], choices=[1, 2, 3, 4], metavar="N")
    parser.add_argument("--backend", default="auto", help="whose kernels")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of features and parameters")
    args = parser.parse_args(argv)
    check_options(parser, args)
    try:
        kernels: Backend = resolve_backend(args.backend, torch.device(args.device))
    except (ValueError, BackendUnavailableError) as error:
        parser.error(f"--backend {args.backend}: {error}")
    reason = kernels.rejects(torch.device(args.device), DTYPES[args.dtype], KERNEL)
    if reason is not None:
        parser.error(f"--backend {kernels.name}: {reason}")
    args.kernels, args.backend = kernels, kernels.name
    return args


def print_line(r: Result) -> None:
    """A line of the table."""
    line = f"{r.model:<17}{r.stage:>6}{r.channels:>6}  {r.what:<27}"
    if r.us is None:
        print(f"{line}{'–':>10}  {r.note}", flush=True)
        return
    ratio = "–" if r.against_dense is None else f"{r.against_dense:.2f}×"
    gathered = "" if r.gathered_us is None else f"{r.gathered_us:.1f}"
    print(
        f"{line}{r.us:>10.1f}{r.floor_us:>9.1f} {r.bound:<11}{r.of_floor:>9.0%}{r.dense_us:>11.1f}{ratio:>8}"
        f"{gathered:>11}{r.error:>9.1e}  {r.note or ''}".rstrip(),
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write the JSON after each result; 2 where results differ or a kernel fails."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    kernels, dtype = args.kernels, DTYPES[args.dtype]
    facts = hardware(device) | {"backend": args.backend} | same_arithmetic(device)
    print_head(facts, args, args.dtype)
    clock = Clock(device, args.repeats, args.warmup)
    rates = Rates.measure(clock, dtype)
    facts |= {"copy_gb_s": rates.copy / 1e9, "float32_tflop_s": rates.float32 / 1e12}
    facts |= {"products_tflop_s": rates.products / 1e12}
    print(
        f"copy {rates.copy / 1e9:,.0f} GB/s, float32 {rates.float32 / 1e12:.2f} TFLOP/s, matrix products "
        f"{rates.products / 1e12:.2f} TFLOP/s"
    )
    print(f"{'model':<17}{'stage':>6}{'C':>6}  {'what':<27}{'µs':>10}{'floor':>9} {'bound by':<11}", end="")
    print(f"{'of floor':>9}{'dense µs':>11}{'ratio':>8}{'densified':>11}{'error':>9}")
    results: list[Result] = []
    options = argparse.Namespace(**{k: v for k, v in vars(args).items() if k != "kernels"})

    def told(result: Result) -> None:
        results.append(result)
        print_line(result)
        write_report(facts, options, results)

    measured = Measured(args, clock, told)
    fused = kernels.fuses_mlp(device, dtype, torch.float32) or kernels.fuses_mlp(device, dtype, dtype)
    for name in args.models:
        config = encoder_config(name)
        try:
            kernels.warm_up(config.stages, config.kernel_size, device, dtype)
        except Exception as failure:  # a compiler's: the kernels that it has are measured, and the others fail again
            print(f"error: {name}, kernels compiled beforehand: {first_line(failure)}", file=sys.stderr)
        for stage in stages(args, name):
            measured(stage, DEPTHWISE, partial(depthwise, args, clock, rates, stage))
            if fused:
                measured(stage, POINTWISE, partial(pointwise, args, clock, rates, stage))
    failures = [r for r in results if r.note is not None]
    for r in failures:
        print(f"error: {r.model}, stage {r.stage}, {r.what}: {r.note}", file=sys.stderr)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

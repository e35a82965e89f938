"""Each kernel of a backend against its floor, against dense, and against densify, convolve, gather.

For the depthwise convolution the floor is the larger of two times: the bytes that must move (features read once,
results written once) over the bandwidth of a copy measured in the same run, and the multiply-adds of taps that lie on
visible cells over the float32 rate of the device. For the pointwise half of a block it is the larger of the bytes and
of its matrix products at the rate of a large one in that dtype. ``of floor`` is the floor over the time, 100 % being
perfect. Dense is torch's (cuDNN's) operation on every cell of the same images; its results are compared, and no figure
is printed where they differ.

    python benchmarks/ops.py --device cuda --dtype bfloat16 --models tiny base --batch-size 128 --json ops.json
    python benchmarks/ops.py --models atto --batch-size 8
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from common import DTYPES, add_options, check_options, hardware, print_head, relative_error, synchronise, write_report
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
    us: float
    floor_us: float
    bound: str
    of_floor: float
    dense_us: float
    against_dense: float
    gathered_us: float | None
    error: float
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
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which all launches of the call are queued
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
    """Float32 FLOP a second of a GPU's ordinary units by its clock, 0 where torch does not tell."""
    if device.type != "cuda":
        return 0.0
    properties = torch.cuda.get_device_properties(device)
    lanes = 64 if (properties.major, properties.minor) == (8, 0) else 128
    return 2.0 * lanes * properties.multi_processor_count * getattr(properties, "clock_rate", 0) * 1e3


def visible_taps(active: ActiveSet) -> int:
    """Taps of a 7×7 kernel that lie on visible cells, over all active cells."""
    return int((active.cell_neighbours(KERNEL) < active.num_cells).sum())


def check(name: str, ours: list[Tensor], theirs: list[Tensor], dtype: str) -> float:
    """The largest relative difference.

    Raises:
        RuntimeError: if it is beyond the tolerance.
    """
    error = relative_error(ours, theirs)
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(f"{name}: results differ from dense by {error:.1e}")
    return error


def depthwise(args: argparse.Namespace, clock: Clock, rates: Rates, stage: Stage) -> list[Result]:
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
    results = []
    for what, (ours, dense, other) in calls.items():
        expected = dense()
        if what != "depthwise, grad of weight":
            expected = active.gather(expected.permute(0, 2, 3, 1))
        error = check(f"{stage}, {what}", [ours()], [expected], args.dtype)
        times = clock(ours, dense, *([other] if other else []))
        results.append(stage.result(what, move, compute, times, error))
    return results


def pointwise(args: argparse.Namespace, clock: Clock, rates: Rates, stage: Stage) -> list[Result]:
    """LayerNorm to projection, forward and backward: the backend's, and separate operations on every cell."""
    active, backend, dtype = stage.active, args.kernels, DTYPES[args.dtype]
    channels, hidden = stage.channels, 4 * stage.channels
    mixed = backend.fuses_mlp(clock.device, dtype, torch.float32)
    if not mixed and not backend.fuses_mlp(clock.device, dtype, dtype):
        return []

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

    ours, theirs = fused(), separate()
    our_grads = torch.autograd.grad(ours, [x, *own], grad, retain_graph=True)
    their_grads = list(torch.autograd.grad(theirs, [dense_x, *leaves], dense_grad, retain_graph=True))
    their_grads[0] = active.gather(their_grads[0])
    error = check(f"{stage}, pointwise", [ours, *our_grads], [active.gather(theirs), *their_grads], args.dtype)

    size = x.element_size()
    cells = active.num_cells
    products = 2 * 2 * cells * channels * hidden / rates.products
    # The hidden layer is written once and read twice, before and after the norms are known.
    forward = clock(lambda: fused(), lambda: separate())
    backward = clock(
        lambda: torch.autograd.grad(ours, [x, *own], grad, retain_graph=True),
        lambda: torch.autograd.grad(theirs, [dense_x, *leaves], dense_grad, retain_graph=True),
    )
    return [
        stage.result(
            "pointwise half", cells * (2 * channels + 3 * hidden) * size / rates.copy, products, forward, error
        ),
        stage.result(
            "pointwise half, gradients",
            cells * (3 * channels + 2 * hidden) * size / rates.copy,
            2 * products,
            backward,
            error,
        ),
    ]


@dataclass(frozen=True)
class Stage:
    """A stage of a network on an active set."""

    model: str
    number: int
    channels: int
    active: ActiveSet

    def __str__(self) -> str:
        return f"{self.model}, stage {self.number}"

    def result(self, what: str, move: float, compute: float, times: list[list[float]], error: float) -> Result:
        """``move`` and ``compute`` are the two floors in seconds; ``times`` are ours, dense, and perhaps gathered."""
        ours, dense, *gathered = (statistics.median(found) for found in times)
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
            against_dense=dense / ours,
            gathered_us=gathered[0] if gathered else None,
            error=error,
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


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write the JSON; 2 where results differ."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    facts = hardware(device) | {"backend": args.backend}
    print_head(facts, args, args.dtype)
    clock = Clock(device, args.repeats, args.warmup)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        rates = Rates.measure(clock, DTYPES[args.dtype])
        facts |= {"copy_gb_s": rates.copy / 1e9, "float32_tflop_s": rates.float32 / 1e12}
        facts |= {"products_tflop_s": rates.products / 1e12}
        print(
            f"copy {rates.copy / 1e9:,.0f} GB/s, float32 {rates.float32 / 1e12:.2f} TFLOP/s, matrix products "
            f"{rates.products / 1e12:.2f} TFLOP/s"
        )
        print(f"{'model':<17}{'stage':>6}{'C':>6}  {'what':<27}{'µs':>10}{'floor':>9} {'bound by':<11}", end="")
        print(f"{'of floor':>9}{'dense µs':>11}{'ratio':>8}{'densified':>11}{'error':>9}")
        results: list[Result] = []
        for name in args.models:
            config = encoder_config(name)
            args.kernels.warm_up(config.stages, config.kernel_size, device, DTYPES[args.dtype])
            for stage in stages(args, name):
                try:
                    new = depthwise(args, clock, rates, stage) + pointwise(args, clock, rates, stage)
                except RuntimeError as error:
                    print(f"error: {error}", file=sys.stderr)
                    return 2
                results += new
                for r in new:
                    gathered = "" if r.gathered_us is None else f"{r.gathered_us:.1f}"
                    print(
                        f"{r.model:<17}{r.stage:>6}{r.channels:>6}  {r.what:<27}{r.us:>10.1f}{r.floor_us:>9.1f} "
                        f"{r.bound:<11}{r.of_floor:>9.0%}{r.dense_us:>11.1f}{r.against_dense:>7.2f}×{gathered:>11}"
                        f"{r.error:>9.1e}",
                        flush=True,
                    )
    del args.kernels
    write_report(facts, args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

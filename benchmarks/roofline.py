"""Each part of a pre-training step against what the machine can do: its own matrix product, its own copy.

The peak is torch's product of two float32 matrices of 2048×2048, the bandwidth that of a copy, both taken in turns with
the parts, so that a drift of the machine hits all alike. A part's floor is the larger of its multiply-adds at that peak
and of its bytes at that bandwidth: tensors that it must read or write once. Multiply-adds are those of taps on visible
cells and of matrix products; backward they count twice, but for the stem, whose images need no gradient. ``library``
is the rate of torch's own product at the shapes of that part. Layers of a stage are alike: one is timed, and counted
as often as there are. The encoder and the step are timed whole as well, so what the parts leave out shows.

    python benchmarks/roofline.py --models atto tiny --threads 1 --json roofline.json --plot roofline.png
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from common import add_options, check_options, hardware, print_head, write_report
from ops import Clock, visible_taps
from torch import Tensor

from convnextv2.models.config import check_image_size
from convnextv2.models.encoder import Block
from convnextv2.models.fcmae import FCMAE, create_fcmae
from convnextv2.models.masking import keep_count, random_mask
from convnextv2.training.optim import create_optimizer, parameter_groups
from sparse_ops import ActiveSet, SparseGrid, resolve_backend
from sparse_ops.grid import MLP
from sparse_ops.layers import pointwise_conv

PEAK_SIDE = 2048
COPY_BYTES = 64 * 2**20
WHOLE = ("encoder", "step")
"""Rows that are not parts: what they take, the parts take again."""


@dataclass
class Part:
    """A part of a step, to be timed.

    Args:
        count: how often a step has it.
        forward: computes it; of a part without ``leaves`` this is all that it does.
        leaves: what the backward pass takes gradients for.
        multiply_adds: of one forward pass.
        backward_factor: multiply-adds of the backward pass over those of the forward pass.
        bytes: read and written once, forward and backward, of a part without ``leaves``; else found from its tensors.
        shape: (rows, inner, columns) of its matrix product, for the library's own rate.
    """

    name: str
    forward: Callable[[], Tensor | None]
    leaves: Sequence[Tensor] = ()
    count: int = 1
    multiply_adds: float = 0.0
    backward_factor: float = 2.0
    bytes: float = 0.0
    shape: tuple[int, int, int] | None = None

    def calls(self) -> list[Callable[[], object]]:
        """Forward, and backward where there is one."""
        if not self.leaves:
            return [self.forward]
        out = self.forward()
        assert out is not None
        grad = torch.randn_like(out)
        ends = out.nbytes, sum(leaf.nbytes for leaf in self.leaves)
        self.bytes = sum(ends) + sum(ends) + ends[1]  # backward: the gradient and the leaves in, their gradients out
        return [self.forward, lambda: torch.autograd.grad(out, self.leaves, grad, retain_graph=True)]

    @property
    def step_flop(self) -> float:
        """Of a step: two for each multiply-add."""
        return 2 * self.multiply_adds * self.count * (1 + self.backward_factor * bool(self.leaves))


@dataclass
class Result:
    """One line of the table; times in milliseconds, of one step of the batch."""

    model: str
    part: str
    count: int
    forward_ms: float
    backward_ms: float | None
    ms_min: float
    ms_max: float
    of_step: float
    gflop: float
    gflop_s: float
    of_peak: float
    floor_ms: float | None
    of_floor: float | None
    flop_per_byte: float | None
    library_of_peak: float | None
    times_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Peak:
    """Of this machine in this run: FLOP a second of a large product, bytes a second of a copy (read and written)."""

    flop_s: float
    bytes_s: float


def normal(*shape: int) -> Tensor:
    """Numbers that a gradient is taken for."""
    return torch.randn(shape).requires_grad_()


def block_parts(name: str, block: Block, grid: SparseGrid, count: int, rows: Tensor | None = None) -> Iterator[Part]:
    """The two halves of a block; with ``rows``, the last product is that of those cells alone."""
    active, channels = grid.active, block.dwconv.weight.shape[0]
    cells, results = active.num_cells, active.num_cells if rows is None else rows.numel()
    layers = MLP(block.norm, block.pwconv1, block.act, block.grn, block.pwconv2)
    pointwise = [parameter for layer in layers for parameter in layer.parameters()]
    x, y = normal(cells, channels), normal(cells, channels)
    yield Part(
        f"{name} convolution",
        lambda: grid.depthwise(block.dwconv, x),
        [x, *block.dwconv.parameters()],
        count,
        visible_taps(active) * channels,
    )
    yield Part(
        f"{name} pointwise half",
        lambda: grid.mlp(y, layers, rows),
        [y, *pointwise],
        count,
        4.0 * channels**2 * (cells + results),
        shape=(cells, channels, 4 * channels),
    )


def encoder_parts(model: FCMAE, visible: ActiveSet, images: Tensor) -> list[Part]:
    """Stem, downsamplings, and the halves of the blocks of each stage."""
    config = model.config.encoder
    grid = SparseGrid(visible, resolve_backend(model.backend, images.device))
    found, below = [], 0
    for number, (reduce, stage) in enumerate(zip(model.encoder.downsample_layers, model.encoder.stages, strict=True)):
        channels, parameters = config.dims[number], list(reduce.parameters())
        if number == 0:
            inner = config.in_chans * config.stem_stride**2
            work = float(visible.num_cells * channels * inner)
            found.append(Part("stem", partial(reduce, images, grid), parameters, 1, work, 1.0))
        else:
            x, above = normal(grid.active.num_cells, below), grid
            grid, inner = grid.down(), 4 * below
            shape = grid.active.num_cells, inner, channels
            found.append(
                Part(
                    f"downsampling {number + 1}",
                    partial(reduce, x, above),
                    [x, *parameters],
                    1,
                    float(math.prod(shape)),
                    shape=shape,
                )
            )
        found += block_parts(f"stage {number + 1}", stage[0], grid, len(stage))
        below = channels
    return found


def decoder_parts(model: FCMAE, last: ActiveSet, hidden: ActiveSet, images: Tensor) -> list[Part]:
    """Projection onto the map, the blocks, the prediction, targets and loss."""
    config, backend = model.config, resolve_backend(model.backend, images.device)
    width, channels, pixels = config.decoder_dim, config.encoder.dims[-1], model.pred.weight.shape[0]
    full = ActiveSet.full(hidden.batch_size, hidden.grid_size, side=1)
    grid, masked = SparseGrid(full, backend), hidden.num_cells
    features, rows, pred = normal(last.num_cells, channels), normal(masked, width), normal(masked, pixels)
    target = model.targets(images, hidden)
    found = [
        Part(
            "projection",
            lambda: last.densify(pointwise_conv(model.proj, features), fill=model.mask_token.flatten()),
            [features, *model.proj.parameters(), model.mask_token],
            1,
            float(features.numel() * width),
            shape=(last.num_cells, channels, width),
        )
    ]
    *blocks, end = model.decoder
    if blocks:
        found += block_parts("decoder", blocks[0], grid, len(blocks))
    found += block_parts("decoder, last" if blocks else "decoder", end, grid, 1, hidden.patch_index)
    found += [
        Part(
            "prediction",
            lambda: pointwise_conv(model.pred, rows),
            [rows, *model.pred.parameters()],
            1,
            float(rows.numel() * pixels),
            shape=(masked, width, pixels),
        ),
        Part("targets", lambda: model.targets(images, hidden), bytes=2 * target.nbytes),
        Part("loss", lambda: model.loss(pred, target), [pred]),
    ]
    return found


def update_part(model: FCMAE) -> Part:
    """The optimizer of the training, fused, on parameters of its own that keep their gradients."""
    model = copy.deepcopy(model)
    optimizer = create_optimizer(parameter_groups(model, 0.05), 1e-9, (0.9, 0.95), fused=True)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    # Parameter and two moments are read and written, the gradient is read.
    return Part("optimizer", optimizer.step, bytes=7 * sum(p.nbytes for p in parameters))


def whole_parts(args: argparse.Namespace, model: FCMAE, images: Tensor, work: Sequence[Part]) -> list[Part]:
    """The encoder and a step, as they run in training; ``work`` are the encoder's parts, then the others."""
    grid_size, keep = model.config.grid_size, keep_count(math.prod(model.config.grid_size), args.mask_ratio)
    mask = random_mask(args.batch_size, math.prod(grid_size), args.mask_ratio)
    masks = torch.Generator()
    encoder = [part for part in work if part.name.startswith(("stem", "stage", "downsampling"))]
    optimizer = create_optimizer(parameter_groups(model, 0.05), 1e-9, (0.9, 0.95), fused=True)
    last = ActiveSet.from_mask(mask, grid_size, side=1, keep=keep)
    weights = torch.randn(last.num_cells, model.config.encoder.dims[-1])

    def encode() -> None:
        features, _ = model.encode(images, ActiveSet.from_mask(mask, grid_size, keep=keep))
        torch.autograd.backward(features, weights)
        model.zero_grad()

    def step() -> None:
        model(images, generator=masks.manual_seed(args.seed), return_pred=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return [
        Part("encoder", encode, multiply_adds=sum(part.step_flop for part in encoder) / 2),
        Part("step", step, multiply_adds=sum(part.step_flop for part in work) / 2),
    ]


def tables_part(args: argparse.Namespace, model: FCMAE) -> Part:
    """Drawing the mask, and every table of the active sets that a step needs."""
    (gh, gw), kernel = model.config.grid_size, model.config.encoder.kernel_size
    keep = keep_count(gh * gw, args.mask_ratio)

    def build() -> None:
        mask = random_mask(args.batch_size, gh * gw, args.mask_ratio)
        active = ActiveSet.from_mask(mask, (gh, gw), keep=keep)
        ActiveSet.from_mask(1 - mask, (gh, gw), side=1, keep=gh * gw - keep)
        for _ in range(3):
            active.patch_neighbours(kernel)
            _ = active.row_offsets
            active = active.down()
        active.patch_neighbours(kernel)
        _ = active.row_offsets, active.coordinates

    return Part("mask and tables", build)


def products(parts: Sequence[Part]) -> dict[tuple[int, int, int], Callable[[], object]]:
    """torch's own product at each of the shapes."""
    shapes = {part.shape for part in parts if part.shape is not None and min(part.shape) > 0}
    found: dict[tuple[int, int, int], Callable[[], object]] = {}
    for rows, inner, columns in sorted(shapes):
        a, b = torch.randn(rows, inner), torch.randn(columns, inner)
        found[rows, inner, columns] = lambda a=a, b=b: a @ b.t()
    return found


def measure(args: argparse.Namespace, name: str) -> tuple[Peak, list[Result]]:
    """Time everything in turns."""
    torch.manual_seed(args.seed)
    model = create_fcmae(name, img_size=args.img_size, mask_ratio=args.mask_ratio, backend=args.backend)
    images, (gh, gw) = torch.randn(args.batch_size, 3, *args.img_size), model.config.grid_size
    keep = keep_count(gh * gw, args.mask_ratio)
    mask = random_mask(args.batch_size, gh * gw, args.mask_ratio)
    visible = ActiveSet.from_mask(mask, (gh, gw), keep=keep)
    hidden = ActiveSet.from_mask(1 - mask, (gh, gw), side=1, keep=gh * gw - keep)
    parts = encoder_parts(model, visible, images)
    parts += decoder_parts(model, visible.down().down().down(), hidden, images)
    parts += [tables_part(args, model), update_part(model)]
    parts += whole_parts(args, copy.deepcopy(model), images, parts)  # its update leaves the weights of the parts alone

    square, source = torch.randn(PEAK_SIDE, PEAK_SIDE), torch.zeros(COPY_BYTES, dtype=torch.uint8)
    target, library = torch.empty_like(source), products(parts)
    machine: list[Callable[[], object]] = [lambda: square @ square, lambda: target.copy_(source)]
    of_parts = [part.calls() for part in parts]
    clock = Clock(torch.device("cpu"), args.repeats, args.warmup)
    times = iter(clock(*machine, *library.values(), *(call for calls in of_parts for call in calls)))
    seconds = [statistics.median(next(times)) * 1e-6 for _ in machine]
    peak = Peak(2 * PEAK_SIDE**3 / seconds[0], 2 * source.numel() / seconds[1])
    shares = {s: 2 * math.prod(s) / (statistics.median(next(times)) * 1e-6) / peak.flop_s for s in library}
    found = [(part, [next(times) for _ in calls]) for part, calls in zip(parts, of_parts, strict=True)]
    whole = statistics.median(found[-1][1][0])
    return peak, [result(name, part, own, peak, whole, shares) for part, own in found]


def result(
    model: str, part: Part, times_us: list[list[float]], peak: Peak, step_us: float, shares: dict[tuple, float]
) -> Result:
    """``times_us``: forward, and backward where there is one, of one such part."""
    own = [[time * 1e-3 * part.count for time in found] for found in times_us]
    both = [sum(turn) for turn in zip(*own, strict=True)]
    ms, flop, moved = statistics.median(both), part.step_flop, part.bytes * part.count
    floor = max(flop / peak.flop_s, moved / peak.bytes_s) * 1e3 if moved else None
    rate = flop / (ms * 1e-3)
    return Result(
        model=model,
        part=part.name,
        count=part.count,
        forward_ms=statistics.median(own[0]),
        backward_ms=statistics.median(own[1]) if len(own) > 1 else None,
        ms_min=min(both),
        ms_max=max(both),
        of_step=ms / (step_us * 1e-3),
        gflop=flop * 1e-9,
        gflop_s=rate * 1e-9,
        of_peak=rate / peak.flop_s,
        floor_ms=floor,
        of_floor=None if floor is None else floor / ms,
        flop_per_byte=flop / moved if moved and flop else None,
        library_of_peak=None if part.shape is None else shares.get(part.shape),
        times_ms=both,
    )


def print_table(results: Sequence[Result]) -> None:
    """Parts in the order of a step, then the whole, then what the parts leave out."""
    for r in results:
        backward = "" if r.backward_ms is None else f"{r.backward_ms:.2f}"
        spread = f"({r.ms_min:.1f}–{r.ms_max:.1f})"
        line = f"{r.model:<17}{r.part:<24}{r.count:>3}{r.forward_ms:>10.2f}{backward:>10}{spread:>16}{r.of_step:>8.1%}"
        if r.gflop:
            line += f"{r.gflop:>9.2f}{r.gflop_s:>9.1f}{r.of_peak:>8.0%}"
        else:
            line += " " * 26
        line += f"{'' if r.of_floor is None else f'{r.of_floor:.0%}':>9}"
        line += f"{'' if r.library_of_peak is None else f'{r.library_of_peak:.0%}':>9}"
        print(line, flush=True)
    rest = 1 - sum(r.of_step for r in results if r.part not in WHOLE)
    print(f"between the parts of {results[0].model}: {rest:.1%} of the step")


def draw(path: Path, peak: Peak, results: Sequence[Result]) -> None:
    """A roofline: rates over FLOP a byte, both logarithmic, below bandwidth and peak; areas are shares of the step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    points = [r for r in results if r.flop_per_byte is not None]
    reach = [min([0.25, *(r.flop_per_byte / 2 for r in points)]), max([500, *(r.flop_per_byte * 2 for r in points)])]
    ridge = peak.flop_s / peak.bytes_s
    roof = [reach[0] * peak.bytes_s, peak.flop_s, peak.flop_s]
    axes.plot([reach[0], ridge, reach[1]], [y * 1e-9 for y in roof], color="black", linewidth=1)
    for name, colour in zip(dict.fromkeys(r.model for r in points), ("C0", "C1", "C2", "C3", "C4") * 2, strict=False):
        own = [r for r in points if r.model == name]
        sizes = [20 + 1500 * r.of_step for r in own]
        xs, ys = [r.flop_per_byte for r in own], [r.gflop_s for r in own]
        axes.scatter(xs, ys, sizes, color=colour, alpha=0.5, label=name)
        for r in own:
            if r.of_step > 0.01:  # smaller ones would only cover them
                axes.annotate(r.part, (r.flop_per_byte, r.gflop_s), fontsize=6, color=colour, rotation=30)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte that must move", ylabel="GFLOP/s")
    axes.set_title(f"{peak.flop_s * 1e-9:.0f} GFLOP/s of products, {peak.bytes_s * 1e-9:.0f} GB/s of a copy")
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ["atto", "pico", "tiny"])
    parser.add_argument("--backend", default="auto", help="whose kernels")
    parser.add_argument("--plot", type=Path, help="draw the roofline into this file: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    check_options(parser, args)
    if args.plot is not None and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot {args.plot}: expected a name that ends in .png, .svg or .pdf")
    device = torch.device(args.device)
    if device.type != "cpu":
        parser.error(f"--device {args.device}: this measures a processor; for a GPU: benchmarks/ops.py")
    try:
        check_image_size(args.img_size, 32)
        keep_count(args.img_size[0] * args.img_size[1] // 32**2, args.mask_ratio)
        backend = resolve_backend(args.backend, device)
        if not backend.fuses_mlp(device, torch.float32, torch.float32):
            raise ValueError("its pointwise half is separate layers of torch; take one that fuses it, such as cpu")
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    args.backend = backend.name
    return args


def main(argv: list[str] | None = None) -> int:
    """Run, print the tables, write JSON and plot."""
    args = parse_args(argv)
    facts = hardware(torch.device("cpu")) | {"backend": resolve_backend(args.backend, torch.device("cpu")).summary}
    print_head(facts, args, "float32")
    results: list[Result] = []
    peaks: list[Peak] = []
    for name in args.models:
        peak, new = measure(args, name)
        peaks.append(peak)
        results += new
        print(f"\n{peak.flop_s * 1e-9:.1f} GFLOP/s of products, {peak.bytes_s * 1e-9:.1f} GB/s of a copy")
        print(
            f"{'model':<17}{'part':<24}{'n':>3}{'forward':>10}{'backward':>10}{'(min–max) ms':>16}{'of step':>8}",
            end="",
        )
        print(f"{'GFLOP':>9}{'GFLOP/s':>9}{'of peak':>8}{'of floor':>9}{'library':>9}")
        print_table(new)
    facts |= {"products_gflop_s": [p.flop_s * 1e-9 for p in peaks], "copy_gb_s": [p.bytes_s * 1e-9 for p in peaks]}
    plot, args.plot = args.plot, None if args.plot is None else str(args.plot)
    write_report(facts, args, results)
    if plot is not None:
        flop_s, bytes_s = (max(getattr(p, key) for p in peaks) for key in ("flop_s", "bytes_s"))
        draw(plot, Peak(flop_s, bytes_s), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

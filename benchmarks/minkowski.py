"""The encoder on MinkowskiEngine against the stock depthwise layer of its releases, and against other backends.

Three ways to run the same encoder with the same weights, forward and backward, in turns and in one process:

- ``stock``: every layer on MinkowskiEngine, the depthwise ones on its own ``MinkowskiChannelwiseConvolution``;
- ``minkowski``: the same, with the depthwise layer of this project;
- other backends, ``cpu`` by default.

A ratio is printed only if outputs and gradients of that very run agree with the dense masked network.

    python benchmarks/minkowski.py --models atto --batch-size 16 --json results.json
    python benchmarks/minkowski.py --parity --models atto femto pico nano tiny base large huge

``--parity`` measures errors instead of times: outputs and gradients in float32 against the dense oracle in float64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from common import (
    Contender,
    add_options,
    agreement,
    check_options,
    hardware,
    print_facts,
    print_head,
    time_in_turns,
    write_report,
)
from encoder import dense_grid, randomise_grn
from torch import Tensor, nn

from convnextv2.models.config import encoder_config
from convnextv2.models.encoder import Encoder
from convnextv2.models.masking import keep_count, random_mask
from sparse_ops import ActiveSet, SparseGrid, get_backend
from sparse_ops.backends.minkowski import layers
from sparse_ops.backends.minkowski.backend import MinkowskiGrid
from sparse_ops.oracle import MaskedDenseGrid


class StockGrid(MinkowskiGrid):
    """MinkowskiEngine's own depthwise layer in place of ours; the rest is the same."""

    def depthwise(self, layer: nn.Conv2d, x: Any) -> Any:
        parameters = {"kernel": layer.weight.transpose(2, 3).flatten(1).t(), "bias": layer.bias[None]}
        return torch.func.functional_call(stock_layer(len(layer.weight), layer.kernel_size[0]), parameters, (x,))


@cache
def stock_layer(channels: int, kernel_size: int) -> Any:
    """``MinkowskiChannelwiseConvolution``, made once: its own weights are replaced at every call."""
    stock = layers.minkowski_engine().MinkowskiChannelwiseConvolution
    return stock(channels, kernel_size=kernel_size, bias=True, dimension=2)


@dataclass
class Result:
    """One line of the table: times of forward and backward pass of one batch, per image."""

    model: str
    contender: str
    ms_per_image: float
    ms_per_image_min: float
    ms_per_image_max: float
    error: float
    """Largest difference of outputs and gradients to the dense masked network, relative to the largest value."""
    speedup: float
    """Against ``stock``, median of the ratios of passes that were timed side by side."""
    speedup_min: float
    speedup_max: float
    times_ms: list[float] = field(default_factory=list)


def measure(args: argparse.Namespace, name: str) -> list[Result]:
    """Check that all contenders agree with the dense network, and time them in turns.

    Raises:
        RuntimeError: if outputs or gradients differ by more than the tolerance.
    """
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    encoder = Encoder(encoder_config(name)).to(device)
    randomise_grn(encoder)
    images = torch.randn(args.batch_size, 3, *args.img_size, device=device)
    grid_size = args.img_size[0] // 32, args.img_size[1] // 32
    patches = grid_size[0] * grid_size[1]
    mask = random_mask(args.batch_size, patches, args.mask_ratio, device=device)
    keep = keep_count(patches, args.mask_ratio)
    visible = ActiveSet.from_mask(mask, grid_size, keep=keep)
    last = visible.down().down().down()
    weights = torch.randn(last.num_cells, encoder.encoder_config.dims[-1], device=device)

    def contender(title: str, rows: Callable[[], Tensor]) -> Contender:
        def forward() -> tuple[Tensor, Tensor]:
            out = rows()
            return (out * weights).sum(), out

        return Contender(title, forward, list(encoder.parameters()))

    def sparse(backend: str) -> Callable[[], Tensor]:
        def rows() -> Tensor:
            # A batch has a mask of its own, so coordinates and kernel maps are part of the pass.
            active = ActiveSet.from_mask(mask, grid_size, keep=keep)
            if backend == "stock":
                return encoder(images, StockGrid(active, get_backend("minkowski")))
            return encoder(images, SparseGrid(active, backend))

        return rows

    dense = contender("dense", lambda: last.gather(encoder(images, dense_grid(visible)).permute(0, 2, 3, 1)))
    contenders = [contender(title, sparse(title)) for title in ("stock", "minkowski", *args.backends)]
    _, errors, failures = agreement(contenders, dense, "float32", name)
    if failures:
        raise RuntimeError("; ".join(failures))
    time_in_turns(contenders, args)
    stock = contenders[0]
    results = []
    for c in contenders:
        times = [t / args.batch_size for t in c.times_ms]
        ratios = [s / t for s, t in zip(stock.times_ms, c.times_ms, strict=True)]
        results.append(
            Result(
                name,
                c.name,
                statistics.median(times),
                min(times),
                max(times),
                errors[c.name],
                statistics.median(ratios),
                min(ratios),
                max(ratios),
                c.times_ms,
            )
        )
    return results


@dataclass
class Parity:
    """Errors of a whole encoder in float32 against the oracle in float64."""

    model: str
    dims: tuple[int, ...]
    grid_size: tuple[int, int]
    output_error: float
    gradient_error: float
    """The worst of all parameters' gradients, each relative to its largest value."""


def parity(args: argparse.Namespace, name: str, grid_size: tuple[int, int]) -> Parity:
    """Compare the encoder on MinkowskiEngine with the dense oracle; one image of ``grid_size`` patches and another."""
    torch.manual_seed(args.seed)
    config = encoder_config(name)
    if config.dims[0] > args.widest:
        config = replace(config, dims=tuple(dim * args.widest // config.dims[0] for dim in config.dims))
    encoder = Encoder(config).to(args.device)
    randomise_grn(encoder)
    images = torch.randn(2, 3, 32 * grid_size[0], 32 * grid_size[1], device=args.device)
    mask = random_mask(2, grid_size[0] * grid_size[1], args.mask_ratio, device=torch.device(args.device))
    active = ActiveSet.from_mask(mask, grid_size)
    weights = torch.randn(active.num_patches, config.dims[-1], device=args.device)

    def values(rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        (rows * weights.to(rows)).sum().backward()
        gradients = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
        for parameter in encoder.parameters():
            parameter.grad = None
        return rows.detach(), gradients

    found, gradients = values(encoder(images, SparseGrid(active, "minkowski")))
    encoder.double()
    visible = ~mask.bool().view(2, *grid_size)
    oracle = MaskedDenseGrid(visible, dtype=torch.float64)
    dense = oracle.cells(encoder(images.double(), oracle))
    expected, exact = values(dense[visible])
    return Parity(name, config.dims, grid_size, exact_error([found], [expected]), exact_error(gradients, exact))


def exact_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over all pairs, each relative to the largest value of the second, taken in float64."""
    pairs = zip(found, expected, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-300)).item() for a, b in pairs)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ["atto"])
    parser.add_argument("--backends", nargs="*", default=["cpu"], help="backends to time beside the two")
    parser.add_argument("--parity", action="store_true", help="measure errors against the float64 oracle, not times")
    parser.add_argument(
        "--widest", type=int, default=352, metavar="C", help="narrow models whose first stage is wider, for --parity"
    )
    args = parser.parse_args(argv)
    check_options(parser, args)
    return args


def run_speed(args: argparse.Namespace) -> list[Result]:
    """The table of times."""
    print(f"{'model':<18}{'encoder on':<12}{'ms/image':>10}{'(min–max)':>16}", end="")
    print(f"{'against stock':>15}{'(min–max)':>16}{'error':>9}")
    results: list[Result] = []
    for name in args.models:
        for r in measure(args, name):
            results.append(r)
            spread = f"({r.ms_per_image_min:.1f}–{r.ms_per_image_max:.1f})"
            line = f"{r.model:<18}{r.contender:<12}{r.ms_per_image:>10.2f}{spread:>16}"
            print(
                f"{line}{r.speedup:>14.2f}×{f'({r.speedup_min:.2f}–{r.speedup_max:.2f})':>16}{r.error:>9.1e}",
                flush=True,
            )
    return results


def run_parity(args: argparse.Namespace) -> list[Parity]:
    """The table of errors, for a square and an oblong image."""
    print(f"{'model':<18}{'width of stage 1':>18}{'patches':>9}{'output':>10}{'gradients':>11}")
    results = []
    for name in args.models:
        for grid_size in ((3, 3), (2, 5)):
            p = parity(args, name, grid_size)
            results.append(p)
            patches = f"{p.grid_size[0]}×{p.grid_size[1]}"
            print(
                f"{p.model:<18}{p.dims[0]:>18}{patches:>9}{p.output_error:>10.1e}{p.gradient_error:>11.1e}", flush=True
            )
    return results


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write the JSON; 2 where contenders disagree or MinkowskiEngine is missing."""
    args = parse_args(argv)
    try:
        get_backend("minkowski")
        facts = hardware(torch.device(args.device)) | {"MinkowskiEngine": layers.minkowski_engine().__version__}
        if args.parity:
            print_facts(facts)
            results = run_parity(args)
        else:
            print_head(facts, args, "float32")
            results = run_speed(args)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_report(facts, args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

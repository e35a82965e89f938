"""Speed and memory of the sparse encoder, and of whole training steps, against a dense masked implementation.

The rival computes the same function with the same weights: dense convolutions in channels-last memory, re-masked
before every depthwise convolution and in every GRN norm; eager, and compiled with torch.compile. Ratios are against
the faster of the two in the same run. All contenders take turns, so that a drift of the machine hits them alike. A
ratio is printed only if outputs and gradients of that very run agree.

    python benchmarks/encoder.py --models atto pico tiny --batch-size 16 --json results.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnextv2.config import VARIANTS
from convnextv2.fcmae import FCMAE, create_fcmae
from convnextv2.masking import keep_count, random_mask
from sparse_ops import ActiveSet, Backend, SparseGrid, get_backend, resolve_backend
from sparse_ops.testing import MaskedDenseGrid

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-2, "float16": 2e-2}
"""Largest difference of outputs and gradients, relative to the largest value of the dense ones, through a whole
network: a wrong tap or mask gives differences of order 1."""


@dataclass
class Result:
    """One line of the table. Times are of the forward and backward pass of one batch, per image."""

    model: str
    what: str
    backend: str
    ms_per_image: float
    ms_per_image_min: float
    ms_per_image_max: float
    images_per_s: float
    activation_mb: float
    speedup: float | None = None
    speedup_min: float | None = None
    speedup_max: float | None = None
    memory_ratio: float | None = None
    error: float | None = None
    times_ms: list[float] = field(default_factory=list)


class DenseMaskedFCMAE(FCMAE):
    """The same autoencoder with the dense masked encoder in place of the sparse one; the rest is shared."""

    dense_encoder: Callable[[Tensor, MaskedDenseGrid], Tensor]

    def encode(
        self, images: Tensor, visible: ActiveSet, backend: str | Backend | None = None
    ) -> tuple[Tensor, SparseGrid]:
        features = self.dense_encoder(images, dense_grid(visible))
        last = visible.down().down().down()
        return last.gather(features), SparseGrid(last, backend or self.backend)


def dense_grid(visible: ActiveSet) -> MaskedDenseGrid:
    """The dense masked grid of an active set, after the stem."""
    shape = visible.batch_size, *visible.grid_size
    keep = torch.zeros(shape, dtype=torch.bool, device=visible.device)
    keep[tuple(visible.patch_coordinates.unbind(1))] = True
    return MaskedDenseGrid(keep, visible.side)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference over all pairs, each relative to the largest value of the second."""
    return max(
        ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12)).item()
        for a, b in zip(ours, theirs, strict=True)
    )


def randomise_grn(model: FCMAE) -> None:
    """GRN starts as the identity; give it weights, so that a wrong norm shows."""
    for name, parameter in model.named_parameters():
        if name.endswith(("grn.gamma", "grn.beta")):
            torch.nn.init.normal_(parameter, std=0.2)


class Contender:
    """One implementation: runs a pass, keeps its times.

    Args:
        name: what the table calls it.
        forward: returns the tensor that is differentiated, and the output that is compared.
        parameters: what gradients are taken for.
        update: the optimiser's step, or None.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[], tuple[Tensor, Tensor]],
        parameters: list[Tensor],
        update: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.forward = forward
        self.parameters = parameters
        self.update = update
        self.times_ms: list[float] = []

    def clear(self, keep: bool = False) -> None:
        """Drop the gradients, as an optimiser does before a step; with ``keep`` set them to zero instead."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter) if keep else None

    def run(self) -> None:
        loss, _ = self.forward()
        loss.backward()
        if self.update is not None:
            self.update()

    def values(self) -> list[Tensor]:
        """Output and gradients of one pass."""
        self.clear()
        loss, output = self.forward()
        loss.backward()
        return [output.detach(), *(p.grad.clone() for p in self.parameters if p.grad is not None)]

    def time(self, device: torch.device) -> None:
        self.clear()
        synchronise(device)
        start = time.perf_counter()
        self.run()
        synchronise(device)
        self.times_ms.append((time.perf_counter() - start) * 1e3)


def encoder_contenders(args: argparse.Namespace, model: FCMAE, images: Tensor, mask: Tensor) -> list[Contender]:
    """Dense eager, dense compiled and the backends, for the encoder's forward and backward pass."""
    grid_size = args.img_size[0] // 32, args.img_size[1] // 32
    keep = keep_count(mask.shape[1], args.mask_ratio)
    autocast = torch.autocast(images.device.type, DTYPES[args.dtype], enabled=args.dtype != "float32")
    visible = ActiveSet.from_mask(mask, grid_size, keep=keep)
    last = visible.down().down().down()
    channels_last = images.contiguous(memory_format=torch.channels_last)
    weights = torch.randn(last.num_cells, model.config.encoder.dims[-1], device=images.device)

    def sparse(backend: str) -> Callable[[], tuple[Tensor, Tensor]]:
        def forward() -> tuple[Tensor, Tensor]:
            with autocast:
                active = ActiveSet.from_mask(mask, grid_size, keep=keep)
                rows = model.encoder(images, SparseGrid(active, backend))
            return (rows.float() * weights).sum(), rows

        return forward

    def dense(encoder: Callable[[Tensor, MaskedDenseGrid], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def forward() -> tuple[Tensor, Tensor]:
            with autocast:
                rows = last.gather(encoder(channels_last, dense_grid(visible)))
            return (rows.float() * weights).sum(), rows

        return forward

    parameters = list(model.encoder.parameters())
    contenders = [Contender("dense", dense(model.encoder), parameters)]
    if args.compile:
        contenders.append(Contender("dense-compiled", dense(torch.compile(model.encoder)), parameters))
    return contenders + [Contender(name, sparse(name), parameters) for name in args.backends]


def step_contenders(args: argparse.Namespace, model: FCMAE, images: Tensor, mask: Tensor) -> list[Contender]:
    """The same for a whole training step: encoder, decoder, loss on the masked patches, backward, AdamW."""
    autocast = torch.autocast(images.device.type, DTYPES[args.dtype], enabled=args.dtype != "float32")

    def contender(name: str, network: FCMAE) -> Contender:
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-6, betas=(0.9, 0.95), fused=True)

        def forward() -> tuple[Tensor, Tensor]:
            with autocast:
                loss = network(images, mask, return_pred=False).loss
            return loss, loss

        return Contender(name, forward, list(network.parameters()), optimiser.step)

    def rival(compiled: bool) -> FCMAE:
        network = DenseMaskedFCMAE(model.config, args.backends[0]).to(images.device)
        network.load_state_dict(model.state_dict())
        object.__setattr__(network, "dense_encoder", torch.compile(network.encoder) if compiled else network.encoder)
        return network

    contenders = [contender("dense", rival(compiled=False))]
    if args.compile:
        contenders.append(contender("dense-compiled", rival(compiled=True)))
    for name in args.backends:
        network = FCMAE(model.config, name).to(images.device)
        network.load_state_dict(model.state_dict())
        contenders.append(contender(name, network))
    return contenders


def measure(args: argparse.Namespace, name: str, what: str) -> list[Result]:
    """Check that all contenders agree, time them in turns, measure their memory.

    Raises:
        RuntimeError: if outputs or gradients differ by more than the tolerance.
    """
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    model = create_fcmae(name, img_size=args.img_size, mask_ratio=args.mask_ratio, backend=args.backends[0]).to(device)
    randomise_grn(model)
    images = torch.randn(args.batch_size, 3, *args.img_size, device=device)
    patches = args.img_size[0] // 32 * (args.img_size[1] // 32)
    mask = random_mask(args.batch_size, patches, args.mask_ratio, device=device)
    build = encoder_contenders if what == "encoder" else step_contenders
    contenders = build(args, model, images, mask)

    expected = contenders[0].values()
    errors = {c.name: relative_error(c.values(), expected) for c in contenders[1:]}
    wrong = {key: error for key, error in errors.items() if not error <= TOLERANCE[args.dtype]}
    if wrong:
        raise RuntimeError(f"{name}, {what}: outputs or gradients differ from dense masked, no ratio: {wrong}")

    for contender in contenders:
        for _ in range(args.warmup):
            contender.clear()
            contender.run()
    for _ in range(args.repeats):
        for contender in contenders:
            contender.time(device)
    memory = {}
    for contender in contenders:
        contender.clear(keep=True)
        memory[contender.name] = peak_activation_bytes(contender.run, device)

    results = []
    dense = min((c for c in contenders if c.name.startswith("dense")), key=lambda c: statistics.median(c.times_ms))
    for contender in contenders:
        times = [t / args.batch_size for t in contender.times_ms]
        result = Result(
            model=name,
            what=what,
            backend=contender.name,
            ms_per_image=statistics.median(times),
            ms_per_image_min=min(times),
            ms_per_image_max=max(times),
            images_per_s=1e3 / statistics.median(times),
            activation_mb=memory[contender.name] / 2**20,
            error=errors.get(contender.name),
            times_ms=contender.times_ms,
        )
        if not contender.name.startswith("dense"):
            ratios = [d / t for d, t in zip(dense.times_ms, contender.times_ms, strict=True)]
            result.speedup = statistics.median(ratios)
            result.speedup_min, result.speedup_max = min(ratios), max(ratios)
            result.memory_ratio = memory[contender.name] / memory[dense.name]
        results.append(result)
    return results


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["atto", "pico", "tiny"], help="variants, atto … huge")
    parser.add_argument("--what", nargs="+", default=["encoder", "step"], choices=["encoder", "step"])
    parser.add_argument("--backends", nargs="+", default=["auto"], help="backends to compare with dense masked")
    parser.add_argument("--batch-size", type=int, default=16, help="images a batch")
    parser.add_argument(
        "--img-size", type=int, nargs="+", default=[224], help="pixels: one number, or height and width"
    )
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="float32, or an autocast dtype")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each contender")
    parser.add_argument("--warmup", type=int, default=2, help="passes before timing")
    parser.add_argument("--threads", type=int, help="processor threads; torch's default if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="also time the compiled dense network"
    )
    parser.add_argument("--json", type=Path, help="write hardware, versions and results to this file")
    args = parser.parse_args(argv)
    args.img_size = tuple(args.img_size * 2 if len(args.img_size) == 1 else args.img_size)
    args.models = [m if m.startswith("convnextv2_") else f"convnextv2_{m}" for m in args.models]
    unknown = [m for m in args.models if m not in VARIANTS]
    if unknown:
        parser.error(f"unknown models {', '.join(unknown)}; choose from {', '.join(VARIANTS)}")
    if args.batch_size < 1 or args.repeats < 1:
        parser.error("--batch-size and --repeats must be at least 1")
    args.backends = [
        resolve_backend("auto", torch.device(args.device)).name if b == "auto" else get_backend(b).name
        for b in args.backends
    ]
    return args


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write the JSON; 2 where contenders disagree."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    facts = hardware(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"batch {args.batch_size}, {args.img_size[0]}×{args.img_size[1]}, mask ratio {args.mask_ratio}, {args.dtype}")
    print(f"{'model':<18}{'what':<9}{'backend':<16}{'ms/image':>10}{'(min–max)':>16}{'img/s':>8}{'act. MB':>9}", end="")
    print(f"{'speed-up':>10}{'(min–max)':>14}{'memory':>8}{'error':>9}")
    results: list[Result] = []
    for name in args.models:
        for what in args.what:
            try:
                new = measure(args, name, what)
            except RuntimeError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            results += new
            for r in new:
                spread = f"({r.ms_per_image_min:.1f}–{r.ms_per_image_max:.1f})"
                line = f"{r.model:<18}{r.what:<9}{r.backend:<16}{r.ms_per_image:>10.2f}{spread:>16}"
                line += f"{r.images_per_s:>8.1f}{r.activation_mb:>9.1f}"
                if r.speedup is not None:
                    line += f"{r.speedup:>9.2f}×{f'({r.speedup_min:.2f}–{r.speedup_max:.2f})':>14}"
                    line += f"{r.memory_ratio:>8.2f}{r.error:>9.1e}"
                print(line, flush=True)
            torch.compiler.reset()
    if args.json:
        options = {k: v for k, v in vars(args).items() if k != "json"}
        report = {"hardware": facts, "options": options, "results": [asdict(r) for r in results]}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

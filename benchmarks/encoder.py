"""Speed and memory of the sparse encoder, and of whole training steps, against a dense masked implementation.

The rival computes the same function with the same weights: dense convolutions in channels-last memory, re-masked
before every depthwise convolution and in every GRN norm; eager, and compiled with torch.compile. Ratios are against
the faster of the two in the same run. All contenders take turns, so that a drift of the machine hits them alike. A
ratio is printed only if outputs and gradients of that very run agree.

    python benchmarks/encoder.py --models atto pico tiny --batch-size 16 --json results.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from common import (
    DTYPES,
    Contender,
    add_options,
    agreement,
    check_options,
    hardware,
    peak_flops,
    print_head,
    synchronise,
    time_in_turns,
    write_report,
)
from torch import Tensor

from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import ClassifierConfig, EncoderConfig
from convnextv2.models.fcmae import FCMAE, create_fcmae
from convnextv2.models.masking import keep_count, random_mask
from convnextv2.models.summary import layers
from sparse_ops import ActiveSet, Backend, BackendUnavailableError, SparseGrid, get_backend, resolve_backend
from sparse_ops.backends.triton.backend import TritonBackend
from sparse_ops.oracle import MaskedDenseGrid

COMPILE_MODES = {"compile": "default", "graphs": "reduce-overhead"}


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
    activation_mb: float | None
    """None for CUDA graphs, whose memory the allocator does not count."""
    speedup: float | None = None
    speedup_min: float | None = None
    speedup_max: float | None = None
    memory_ratio: float | None = None
    flop_utilisation: float | None = None
    """Multiply-adds of the visible cells, forward and backward, twice that in FLOP, over what the device could do."""
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
        return last.gather(features.permute(0, 2, 3, 1)), SparseGrid(last, backend or self.backend)


def dense_grid(visible: ActiveSet) -> MaskedDenseGrid:
    """The dense masked grid of an active set, after the stem."""
    shape = visible.batch_size, *visible.grid_size
    keep = torch.zeros(shape, dtype=torch.bool, device=visible.device)
    keep[tuple(visible.patch_coordinates.unbind(1))] = True
    return MaskedDenseGrid(keep, visible.side)


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


def encoder_flop(config: EncoderConfig, patches: int) -> float:
    """FLOP of a forward and backward pass of the encoder on ``patches`` visible patches: three times the forward's."""
    with torch.device("meta"):
        one_patch = layers(ConvNeXtV2(ClassifierConfig(config, num_classes=0)), (config.patch_size, config.patch_size))
    return 3 * 2 * float(sum(layer.multiply_adds for layer in one_patch)) * patches


def randomise_grn(model: FCMAE) -> None:
    """GRN starts as the identity; give it weights, so that a wrong norm shows."""
    for name, parameter in model.named_parameters():
        if name.endswith(("grn.gamma", "grn.beta")):
            torch.nn.init.normal_(parameter, std=0.2)


def encoder_contenders(args: argparse.Namespace, model: FCMAE, images: Tensor, mask: Tensor) -> list[Contender]:
    """Dense eager, dense compiled and the backends, for the encoder's forward and backward pass."""
    grid_size = args.img_size[0] // 32, args.img_size[1] // 32
    keep = keep_count(mask.shape[1], args.mask_ratio)
    autocast = torch.autocast(images.device.type, DTYPES[args.dtype], enabled=args.dtype != "float32")
    visible = ActiveSet.from_mask(mask, grid_size, keep=keep)
    last = visible.down().down().down()
    channels_last = images.contiguous(memory_format=torch.channels_last)
    weights = torch.randn(last.num_cells, model.config.encoder.dims[-1], device=images.device)

    def sparse(name: str) -> Callable[[], tuple[Tensor, Tensor]]:
        backend, mode = entry(name)
        config = model.config.encoder
        backend.warm_up(config.stages, config.kernel_size, images.device, DTYPES[args.dtype])

        def encode(images: Tensor, mask: Tensor) -> Tensor:
            active = ActiveSet.from_mask(mask, grid_size, keep=keep)
            return model.encoder(images, SparseGrid(active, backend))

        run = torch.compile(encode, fullgraph=True, mode=mode) if mode else encode

        def forward() -> tuple[Tensor, Tensor]:
            with autocast:
                rows = run(images, mask)
            return (rows.float() * weights).sum(), rows

        return forward

    def dense(encoder: Callable[[Tensor, MaskedDenseGrid], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def forward() -> tuple[Tensor, Tensor]:
            with autocast:
                rows = last.gather(encoder(channels_last, dense_grid(visible)).permute(0, 2, 3, 1))
            return (rows.float() * weights).sum(), rows

        return forward

    parameters = list(model.encoder.parameters())
    contenders = [Contender("dense", dense(model.encoder), parameters)]
    if args.compile:
        contenders.append(Contender("dense-compiled", dense(torch.compile(model.encoder)), parameters))
    return contenders + [Contender(name, sparse(name), parameters) for name in args.backends]


def entry(name: str) -> tuple[Backend, str | None]:
    """Backend and mode of torch.compile of an entry of ``--backends``."""
    backend, *suffix = name.split("+")
    mode = COMPILE_MODES[suffix[0]] if suffix else None
    if backend == "triton-depthwise":
        get_backend("triton")
        return DepthwiseOnly(), mode
    return get_backend(backend), mode


class DepthwiseOnly(TritonBackend):
    """The Triton kernels for the convolution alone: the pointwise half is torch's, or its compiler's."""

    name = "triton-depthwise"

    def fuses_mlp(self, device: torch.device, dtype: torch.dtype, weights_dtype: torch.dtype) -> bool:
        return False


def step_contenders(args: argparse.Namespace, model: FCMAE, images: Tensor, mask: Tensor) -> list[Contender]:
    """The same for a whole training step: encoder, decoder, loss on the masked patches, backward, AdamW."""
    autocast = torch.autocast(images.device.type, DTYPES[args.dtype], enabled=args.dtype != "float32")
    masks = torch.Generator(images.device)

    def contender(name: str, network: FCMAE) -> Contender:
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-6, betas=(0.9, 0.95), fused=True)

        def forward() -> tuple[Tensor, Tensor]:
            with autocast:
                loss = network(images, generator=masks.manual_seed(args.seed), return_pred=False).loss
            return loss, loss

        return Contender(name, forward, list(network.parameters()), optimiser.step)

    def rival(compiled: bool) -> FCMAE:
        network = DenseMaskedFCMAE(model.config).to(images.device)
        network.load_state_dict(model.state_dict())
        object.__setattr__(network, "dense_encoder", torch.compile(network.encoder) if compiled else network.encoder)
        return network

    contenders = [contender("dense", rival(compiled=False))]
    if args.compile:
        contenders.append(contender("dense-compiled", rival(compiled=True)))
    for name in args.backends:
        network = FCMAE(model.config).to(images.device)
        network.backend, mode = entry(name)
        network.load_state_dict(model.state_dict())
        if mode:
            network.compile(mode=mode)
        contenders.append(contender(name, network))
    return contenders


def measure(args: argparse.Namespace, name: str, what: str) -> tuple[list[Result], list[str]]:
    """Check that all contenders agree, time them in turns, measure their memory; a line for each that fails."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    model = create_fcmae(name, img_size=args.img_size, mask_ratio=args.mask_ratio).to(device)
    randomise_grn(model)
    images = torch.randn(args.batch_size, 3, *args.img_size, device=device)
    patches = args.img_size[0] // 32 * (args.img_size[1] // 32)
    mask = random_mask(args.batch_size, patches, args.mask_ratio, device=device)
    build = encoder_contenders if what == "encoder" else step_contenders
    contenders = build(args, model, images, mask)

    contenders, errors, failures = agreement(contenders, contenders[0], args.dtype, f"{name}, {what}")
    time_in_turns(contenders, args)
    memory: dict[str, float] = {}
    for contender in contenders:
        if not contender.name.endswith("+graphs"):
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
            activation_mb=memory[contender.name] / 2**20 if contender.name in memory else None,
            error=errors.get(contender.name),
            times_ms=contender.times_ms,
        )
        peak = peak_flops(device, args.dtype)
        if peak is not None and what == "encoder":
            flop = encoder_flop(model.config.encoder, args.batch_size * keep_count(patches, args.mask_ratio))
            result.flop_utilisation = flop / (statistics.median(contender.times_ms) * 1e-3 * peak)
        if not contender.name.startswith("dense"):
            ratios = [d / t for d, t in zip(dense.times_ms, contender.times_ms, strict=True)]
            result.speedup = statistics.median(ratios)
            result.speedup_min, result.speedup_max = min(ratios), max(ratios)
            if contender.name in memory:
                result.memory_ratio = memory[contender.name] / memory[dense.name]
        results.append(result)
    return results, failures


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ["atto", "pico", "tiny"])
    parser.add_argument("--what", nargs="+", default=["encoder", "step"], choices=["encoder", "step"])
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["auto"],
        help="what to compare with dense masked: backends, followed by +compile for torch.compile or by +graphs for "
        "CUDA graphs; triton-depthwise is triton with the pointwise half left to torch",
    )
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="float32, or an autocast dtype")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="also time the compiled dense network"
    )
    args = parser.parse_args(argv)
    check_options(parser, args)
    chosen = resolve_backend("auto", torch.device(args.device)).name
    args.backends = [chosen + b.removeprefix("auto") if b.split("+")[0] == "auto" else b for b in args.backends]
    for name in args.backends:
        if name.count("+") > 1 or name.split("+")[1:] not in ([], *([suffix] for suffix in COMPILE_MODES)):
            parser.error(f"--backends {name}: after + only {' or '.join(COMPILE_MODES)}")
        try:
            entry(name)
        except (ValueError, BackendUnavailableError) as error:
            parser.error(f"--backends {name}: {error}")
    return args


def written(value: float | None, form: str) -> str:
    """A number of the table; a dash for None."""
    return "–" if value is None else format(value, form)


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write the JSON after every model; 2 where a contender fails or disagrees."""
    args = parse_args(argv)
    device = torch.device(args.device)
    facts = hardware(device)
    print_head(facts, args, args.dtype)
    print(f"{'model':<18}{'what':<9}{'backend':<16}{'ms/image':>10}{'(min–max)':>16}{'img/s':>8}{'act. MB':>9}", end="")
    print(f"{'speed-up':>10}{'(min–max)':>14}{'memory':>8}{'error':>9}{'of peak':>9}")
    results: list[Result] = []
    status = 0
    for name in args.models:
        for what in args.what:
            new, failures = measure(args, name, what)
            results += new
            write_report(facts, args, results)
            for failure in failures:
                print(f"error: {failure}", file=sys.stderr)
                status = 2
            for r in new:
                spread = f"({r.ms_per_image_min:.1f}–{r.ms_per_image_max:.1f})"
                line = f"{r.model:<18}{r.what:<9}{r.backend:<16}{r.ms_per_image:>10.2f}{spread:>16}"
                line += f"{r.images_per_s:>8.1f}{written(r.activation_mb, '.1f'):>9}"
                if r.speedup is not None:
                    line += f"{r.speedup:>9.2f}×{f'({r.speedup_min:.2f}–{r.speedup_max:.2f})':>14}"
                    line += f"{written(r.memory_ratio, '.2f'):>8}{r.error:>9.1e}"
                if r.flop_utilisation is not None:
                    line = f"{line:<119}{r.flop_utilisation:>8.1%}"
                print(line, flush=True)
            torch.compiler.reset()
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Speed and memory of the sparse encoder, and of whole training steps, against a dense masked implementation.

The rival computes the same function with the same weights: dense convolutions in channels-last memory, re-masked
before every depthwise convolution and in every GRN norm; eager, and compiled with torch.compile (on CUDA as CUDA graphs
too, where a contender is), with TF32 off and cuDNN's benchmark mode on. Ratios are against the fastest of them in the
same run, which the results name, with every rival that failed. All contenders take turns, so that a drift of the
machine hits them alike. A ratio is given only if outputs and gradients of that very run agree; else a note says why.
The JSON is written whenever something has been measured; results are provisional until all contenders took their turns.

    python benchmarks/encoder.py --models atto pico tiny --batch-size 16 --json results.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from common import (
    DTYPES,
    Contender,
    add_options,
    check_options,
    hardware,
    peak_flops,
    print_head,
    same_arithmetic,
    write_report,
)
from match import Match, Plan, Result
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


def encoder_contenders(args: argparse.Namespace, model: FCMAE, images: Tensor, mask: Tensor) -> Plan:
    """Dense eager, dense compiled and the backends, for the encoder's forward and backward pass."""
    grid_size = args.img_size[0] // 32, args.img_size[1] // 32
    keep = keep_count(mask.shape[1], args.mask_ratio)
    autocast = torch.autocast(images.device.type, DTYPES[args.dtype], enabled=args.dtype != "float32")
    visible = ActiveSet.from_mask(mask, grid_size, keep=keep)
    last = visible.down().down().down()
    channels_last = images.contiguous(memory_format=torch.channels_last)
    weights = torch.randn(last.num_cells, model.config.encoder.dims[-1], device=images.device)

    parameters = list(model.encoder.parameters())

    def sparse(name: str) -> Contender:
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

        return Contender(name, forward, parameters)

    def dense(name: str) -> Contender:
        encoder = model.encoder if rivals[name] is None else torch.compile(model.encoder, mode=rivals[name])

        def forward() -> tuple[Tensor, Tensor]:
            with autocast:
                rows = last.gather(encoder(channels_last, dense_grid(visible)).permute(0, 2, 3, 1))
            return (rows.float() * weights).sum(), rows

        return Contender(name, forward, parameters)

    rivals = rival_modes(args)
    return {name: partial(dense, name) for name in rivals} | {name: partial(sparse, name) for name in args.backends}


def rival_modes(args: argparse.Namespace) -> dict[str, str | None]:
    """Names of the dense rivals, and the mode of torch.compile of each."""
    rivals: dict[str, str | None] = {"dense": None}
    if args.compile:
        rivals["dense-compiled"] = "default"
        if torch.device(args.device).type == "cuda" and any(name.endswith("+graphs") for name in args.backends):
            rivals["dense-compiled+graphs"] = COMPILE_MODES["graphs"]
    return rivals


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


def step_contenders(args: argparse.Namespace, model: FCMAE, images: Tensor, mask: Tensor) -> Plan:
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

    def rival(name: str) -> Contender:
        network = DenseMaskedFCMAE(model.config).to(images.device)
        network.load_state_dict(model.state_dict())
        mode = rivals[name]
        encoder = network.encoder if mode is None else torch.compile(network.encoder, mode=mode)
        object.__setattr__(network, "dense_encoder", encoder)
        return contender(name, network)

    def sparse(name: str) -> Contender:
        network = FCMAE(model.config).to(images.device)
        network.backend, mode = entry(name)
        network.load_state_dict(model.state_dict())
        if mode:
            network.compile(mode=mode)
        return contender(name, network)

    rivals = rival_modes(args)
    return {name: partial(rival, name) for name in rivals} | {name: partial(sparse, name) for name in args.backends}


def measure(args: argparse.Namespace, name: str, what: str, told: Callable[[list[Result]], None]) -> list[Result]:
    """Check that all contenders agree, measure their memory, time them in turns; see :class:`Match`."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    model = create_fcmae(name, img_size=args.img_size, mask_ratio=args.mask_ratio).to(device)
    randomise_grn(model)
    images = torch.randn(args.batch_size, 3, *args.img_size, device=device)
    patches = args.img_size[0] // 32 * (args.img_size[1] // 32)
    mask = random_mask(args.batch_size, patches, args.mask_ratio, device=device)
    build = encoder_contenders if what == "encoder" else step_contenders
    results = Match(args, build(args, model, images, mask), partial(Result, name, what), told).run()
    peak = peak_flops(device, args.dtype)
    if peak is not None and what == "encoder":
        flop = encoder_flop(model.config.encoder, args.batch_size * keep_count(patches, args.mask_ratio))
        for result in results:
            if result.times_ms:
                result.flop_utilisation = flop / (statistics.median(result.times_ms) * 1e-3 * peak)
    return results


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


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write the JSON whenever something was measured; 2 where a contender fails or disagrees."""
    args = parse_args(argv)
    device = torch.device(args.device)
    facts = hardware(device) | same_arithmetic(device)
    print_head(facts, args, args.dtype)
    print(f"{'model':<18}{'what':<9}{'backend':<24}{'ms/image':>10}{'(min–max)':>16}{'img/s':>8}{'act. MB':>9}", end="")
    print(f"{'speed-up':>10}{'(min–max)':>14}{'memory':>8}{'error':>9}{'of peak':>9}")
    results: list[Result] = []
    status = 0
    for name in args.models:
        for what in args.what:
            before = tuple(results)
            new = measure(args, name, what, lambda rows, before=before: write_report(facts, args, [*before, *rows]))
            results += new
            write_report(facts, args, results)
            for r in new:
                print(line_of(r), flush=True)
            against = next((r.against for r in new if r.against is not None), None)
            if against is not None:
                print(f"ratios of {name}, {what}, against {against}", flush=True)
            if any(r.note is not None for r in new):
                status = 2
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return status


def line_of(r: Result) -> str:
    """A line of the table."""
    line = f"{r.model:<18}{r.what:<9}{r.backend:<24}"
    if r.ms_per_image is None:
        print(f"error: {r.model}, {r.what}, {r.backend}: {r.note}", file=sys.stderr)
        return f"{line}{'–':>10}  {r.note}"
    spread = f"({r.ms_per_image_min:.1f}–{r.ms_per_image_max:.1f})"
    line += f"{r.ms_per_image:>10.2f}{spread:>16}{r.images_per_s:>8.1f}{r.activation_mb:>9.1f}"
    if r.speedup is not None:
        line += f"{r.speedup:>9.2f}×{f'({r.speedup_min:.2f}–{r.speedup_max:.2f})':>14}"
        line += f"{r.memory_ratio:>8.2f}{r.error:>9.1e}"
    return line if r.flop_utilisation is None else f"{line:<127}{r.flop_utilisation:>8.1%}"


if __name__ == "__main__":
    sys.exit(main())

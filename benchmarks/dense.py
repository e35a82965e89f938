"""Speed and memory of the dense network on a processor: fine-tuning steps and prediction, against timm's same network.

Contenders have the same weights: ours on its kernels; ours on torch's operators; timm's eager and, with ``--compile``,
compiled, each in both memory layouts; transformers' where it is installed. All take turns, so that a drift of the
machine hits them alike. Ratios are against the faster layout, and printed only where outputs (and gradients) of that
very run agree. timm's optimizer is what timm makes of ``adamw``, and transformers' the same; ours is fused, as in
training.

    python benchmarks/dense.py --models atto tiny --json results.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec

import timm
import torch
import torch.nn.functional as F
from common import Contender, add_options, agreement, check_options, hardware, print_head, time_in_turns, write_report
from match import peak_activation_bytes
from torch import Tensor, nn

from convnextv2 import ConvNeXtV2, create_model
from convnextv2.training.optim import create_optimizer, parameter_groups
from convnextv2.weights.loaders import timm_model
from convnextv2.weights.reading import read_weights, write_layout

RIVALS = ("timm", "timm-compiled", "transformers", "ours-torch")


@dataclass
class Result:
    """One line of the table; times are of one batch, per image."""

    model: str
    what: str
    batch_size: int
    contender: str
    ms_per_image: float
    ms_per_image_min: float
    ms_per_image_max: float
    activation_mb: float
    speedup: dict[str, float] = field(default_factory=dict)
    """Ours: median ratio to each rival, pass by pass, the better layout of it."""
    error: float | None = None
    times_ms: list[float] = field(default_factory=list)


class Prediction(Contender):
    """Logits in inference mode: there is no backward pass."""

    def run(self) -> None:
        self.values()

    @torch.inference_mode()
    def values(self) -> list[Tensor]:
        return [self.forward()[1].clone()]


class Step(Contender):
    """A whole step; gradients are compared whatever shape a network gives its parameters."""

    def values(self) -> list[Tensor]:
        return [value.flatten() for value in super().values()]


def networks(args: argparse.Namespace, name: str) -> dict[str, tuple[nn.Module, torch.memory_format, list[Tensor]]]:
    """Contenders by name, with the layout of their images, and their parameters in our order."""
    ours = create_model(name)
    for parameter_name, parameter in ours.named_parameters():
        if parameter_name.endswith(("grn.gamma", "grn.beta")):
            nn.init.normal_(parameter, std=0.2)  # GRN starts as the identity; a wrong norm shall show
    plain = create_model(name, backend="torch")
    plain.load_state_dict(ours.state_dict())
    found: dict[str, tuple[nn.Module, torch.memory_format, list[Tensor]]] = {
        "ours": (ours, torch.contiguous_format, list(ours.parameters())),
        "ours-torch": (plain, torch.contiguous_format, list(plain.parameters())),
    }
    model, options, _ = timm_model(ours.encoder_config)
    names = list(write_layout(read_weights(dict(ours.named_parameters())), "timm"))
    for layout in (torch.contiguous_format, torch.channels_last):
        for compiled in (False, True)[: 1 + args.compile]:
            rival = timm.create_model(model, **{**options, "num_classes": 1000})
            rival.load_state_dict(write_layout(read_weights(ours.state_dict()), "timm"))
            rival = rival.to(memory_format=layout)
            parameters = [rival.get_parameter(each) for each in names]
            label = "timm-compiled" if compiled else "timm"
            label += "" if layout is torch.contiguous_format else "+channels-last"
            if compiled:
                # With the last block in one graph, torch 2.11's inductor passes zeros back from the head.
                rival.forward_head = torch.compiler.disable(rival.forward_head)
            found[label] = torch.compile(rival) if compiled else rival, layout, parameters
    if find_spec("transformers"):
        rival, parameters = transformers_network(ours)
        found["transformers"] = rival, torch.contiguous_format, parameters
    return found


class Logits(nn.Module):
    """transformers' classifier as a function of images that returns logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).logits


def transformers_network(ours: ConvNeXtV2) -> tuple[nn.Module, list[Tensor]]:
    """transformers' network with the weights of ours, and its parameters in our order."""
    import transformers

    config = transformers.ConvNextV2Config(
        depths=list(ours.encoder_config.depths),
        hidden_sizes=list(ours.encoder_config.dims),
        num_labels=1000,
        layer_norm_eps=1e-6,
    )
    network = transformers.ConvNextV2ForImageClassification(config)
    network.load_state_dict(write_layout(read_weights(ours.state_dict()), "transformers"))
    names = write_layout(read_weights(dict(ours.named_parameters())), "transformers")
    return Logits(network), [network.get_parameter(name) for name in names]


def contenders_of(args: argparse.Namespace, name: str, what: str) -> list[Contender]:
    """One for each network, for a whole step or for prediction."""
    images = torch.randn(args.batch_size, 3, *args.img_size)
    labels = torch.randint(1000, (args.batch_size,))
    contenders = []
    for label, (network, layout, parameters) in networks(args, name).items():
        network.train(what == "step")
        given = images.contiguous(memory_format=layout)

        def forward(network: Callable[[Tensor], Tensor] = network, given: Tensor = given) -> tuple[Tensor, Tensor]:
            logits = network(given)
            return F.cross_entropy(logits, labels), logits

        if what == "step":
            groups = parameter_groups(network, 0.05)
            optimizer = create_optimizer(groups, 1e-6, (0.9, 0.999), fused=label.startswith("ours"))
            contenders.append(Step(label, forward, parameters, optimizer.step))
        else:
            contenders.append(Prediction(label, forward, parameters))
    return contenders


def measure(args: argparse.Namespace, name: str, what: str) -> tuple[list[Result], list[str]]:
    """Check that all contenders agree, time them in turns, measure their memory; a line for each that fails."""
    torch.manual_seed(args.seed)
    contenders = contenders_of(args, name, what)
    reference = next(c for c in contenders if c.name == "timm")
    contenders, errors, failures = agreement(contenders, reference, "float32", f"{name}, {what}")
    time_in_turns(contenders, args)
    results = []
    for contender in contenders:
        contender.clear(keep=True)
        times = [t / args.batch_size for t in contender.times_ms]
        result = Result(
            model=name,
            what=what,
            batch_size=args.batch_size,
            contender=contender.name,
            ms_per_image=statistics.median(times),
            ms_per_image_min=min(times),
            ms_per_image_max=max(times),
            activation_mb=peak_activation_bytes(contender.run, torch.device("cpu")) / 2**20,
            error=errors.get(contender.name),
            times_ms=contender.times_ms,
        )
        if contender.name == "ours":
            result.speedup = speedups(contender, contenders)
        results.append(result)
    return results, failures


def speedups(ours: Contender, contenders: list[Contender]) -> dict[str, float]:
    """Median over the passes of a rival's time over ours, for the faster layout of each rival."""
    found = {}
    for rival in RIVALS:
        layouts = [c for c in contenders if c.name.split("+")[0] == rival]
        if layouts:
            best = min(layouts, key=lambda c: statistics.median(c.times_ms))
            ratios = [theirs / own for theirs, own in zip(best.times_ms, ours.times_ms, strict=True)]
            found[rival] = statistics.median(ratios)
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, ["atto", "tiny"])
    parser.add_argument(
        "--what",
        nargs="+",
        default=["step", "predict", "predict-one"],
        choices=["step", "predict", "predict-one"],
        help="a fine-tuning step; prediction of a batch; of one image",
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="also time timm's network compiled"
    )
    args = parser.parse_args(argv)
    check_options(parser, args)
    if args.device != "cpu":
        parser.error(f"--device {args.device}: the kernels of the dense network run on the cpu")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write the JSON after every measurement; 2 where a contender fails or disagrees."""
    args = parse_args(argv)
    facts = hardware(torch.device("cpu")) | {"timm": timm.__version__}
    facts |= {"transformers": version("transformers")} if find_spec("transformers") else {}
    print_head(facts, args, "float32, nothing masked")
    head = f"{'model':<18}{'what':<13}{'batch':>5}  {'contender':<28}{'ms/image':>10}{'(min–max)':>18}{'act. MB':>9}"
    print(f"{head}{'error':>9}  speed-up")
    results: list[Result] = []
    status = 0
    for name in args.models:
        for what in args.what:
            batch = 1 if what == "predict-one" else args.batch_size
            new, failures = measure(argparse.Namespace(**{**vars(args), "batch_size": batch}), name, what)
            results += new
            write_report(facts, args, results)
            for failure in failures:
                print(f"error: {failure}", file=sys.stderr)
                status = 2
            for r in new:
                spread = f"({r.ms_per_image_min:.1f}–{r.ms_per_image_max:.1f})"
                line = (
                    f"{r.model:<18}{r.what:<13}{r.batch_size:>5}  {r.contender:<28}{r.ms_per_image:>10.2f}{spread:>18}"
                )
                line += f"{r.activation_mb:>9.1f}{'–' if r.error is None else format(r.error, '.1e'):>9}  "
                print(line + ", ".join(f"{ratio:.2f}× {rival}" for rival, ratio in r.speedup.items()), flush=True)
            torch.compiler.reset()
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Turn a pre-training checkpoint into the ordinary dense network's weights, and check that both compute the same."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import _cli
import torch
from torch import Tensor

from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import ClassifierConfig
from convnextv2.models.pooling import pooling_of
from convnextv2.outputs import Kind, check_output, is_stream, output_file, output_path
from convnextv2.weights.checkpoint import SUFFIXES, CheckpointError, Config, load_checkpoint, save_checkpoint
from convnextv2.weights.layout import DECODER_PARTS, HEAD_PARTS, Layout
from convnextv2.weights.layouts import LAYOUTS, get_layout
from convnextv2.weights.reading import Weights, describe, read_checkpoint, weights_config, with_norm, write_layout
from convnextv2.weights.verify import verify_conversion


def _was_converted(path: Path) -> bool:
    try:
        return "converted_from" in load_checkpoint(path).metadata
    except CheckpointError:
        return False


CONVERTED = Kind("a converted checkpoint", SUFFIXES, _was_converted)


def parse_arguments() -> argparse.Namespace:
    """The options, checked."""
    targets = [layout for layout in LAYOUTS.values() if layout.target]
    parser = _cli.Parser(
        description=__doc__,
        epilog="The source may be one of our checkpoints or run folders, an official sparse (MinkowskiEngine) or dense "
        "checkpoint, or weights of timm or transformers; its layout, depths, widths, channels and patch size are read "
        "from the weights.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="file or run folder to convert")
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        type=output_path,
        help="file to write: .safetensors, .pth or .pt; - for standard output",
    )
    parser.add_argument(
        "--to",
        choices=[layout.name for layout in targets],
        default="official-dense",
        help=f"layout to write, official-dense by default: {'; '.join(f'{own.name}, {own.about}' for own in targets)}",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="add a final norm if there is none and a fresh head for N classes, so that the file holds a whole "
        "classifier; without it, norm and head are written only if the source has them",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the fresh head, and of the image and mask of --verify (0)"
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the sparse and the dense network on random images and a random mask in float64, and write nothing "
        "if they differ (default)",
    )
    parser.add_argument("--verbose", action="store_true", help="list every tensor instead of counts")
    parser.add_argument("--overwrite", action="store_true", help="let OUTPUT replace a file that was not made here")
    args = parser.parse_args()
    if not is_stream(args.output) and args.output.suffix not in SUFFIXES:
        parser.error(f"OUTPUT must end in {', '.join(SUFFIXES)}, got {str(args.output)!r}")
    headless = [layout.name for layout in targets if "head" not in layout.parts]
    if args.num_classes is not None and (args.num_classes < 1 or args.to in headless):
        parser.error(
            f"--num-classes needs a number of at least 1, and a layout with a head (not {', '.join(headless)})"
        )
    return args


def add_head(weights: Weights, num_classes: int, seed: int) -> tuple[Weights, list[str]]:
    """The weights with a fresh head and, where there is none, a fresh final norm; and the names that are new."""
    torch.manual_seed(seed)
    pooling = pooling_of(weights.head, weights.config.dims[-1])
    whole = ConvNeXtV2(ClassifierConfig(weights.config, num_classes, pooling=pooling)).state_dict()
    head = {name: whole[name] for name in whole if name.split(".")[0] in HEAD_PARTS}
    kept = {name: tensor for name, tensor in weights.head.items() if name.startswith("norm.")}
    result = Weights(**{**vars(weights), "head": head | kept})
    return result, [name for name in head if name not in kept]


def part_of(name: str) -> str:
    """The part of the network that a tensor of the dense network belongs to."""
    first, second = (*name.split("."), "")[:2]
    if first == "downsample_layers":
        return "stem" if second == "0" else f"downsampling {second}"
    return f"stage {int(second) + 1}" if first == "stages" else {"norm": "final norm"}.get(first, first)


def table(
    weights: Weights, kept: list[str], to: Layout, tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
) -> list[tuple[str, ...]]:
    """Rows that tell what became of each part: its name, tensors, parameters, and the names of the first tensor."""
    rows: dict[str, tuple[int, int, str]] = {}
    for name in kept:
        origin, target = weights.names[name], to.name_of(name)
        count, numbers, first = rows.get(part_of(name), (0, 0, f"{origin} -> {target}" if origin != target else origin))
        rows[part_of(name)] = (count + 1, numbers + tensors[1][target].numel(), first)
    header = ("part", "tensors", "parameters", "first of them")
    return [header, *((part, str(count), f"{numbers:,}", first) for part, (count, numbers, first) in rows.items())]


def full_table(
    weights: Weights, kept: list[str], to: Layout, tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
) -> list[tuple[str, ...]]:
    """Rows with the name and shape of every tensor, in the source and as written."""
    source, written = tensors
    pairs = ((weights.names[name], to.name_of(name)) for name in kept)
    return [(f"{a} {list(source[a].shape)}", "->", f"{b} {list(written[b].shape)}") for a, b in pairs]


def listed(names: list[str], verbose: bool) -> str:
    """Names in full, or the parts they belong to with their number."""
    if verbose or not names:
        return ", ".join(names) or "nothing"
    parts: dict[str, int] = {}
    for name in names:
        parts[part_of(name)] = parts.get(part_of(name), 0) + 1
    return ", ".join(f"{part} ({count} tensor{'s' if count > 1 else ''})" for part, count in parts.items())


def output_config(weights: Weights, to: Layout, original: Config | None) -> Config:
    """The configuration to store: of the source where the decoder is kept, else of what the layout holds."""
    kept = replace(weights, **{part: {} for part in ("decoder", "head") if part not in to.parts})
    return original if original is not None and kept.decoder else weights_config(kept)


def main() -> None:
    """Parse, convert, verify, write."""
    args = parse_arguments()
    checkpoint = load_checkpoint(args.checkpoint)
    say = _cli.warn if is_stream(args.output) else _cli.say
    if args.output.exists() and checkpoint.path.samefile(args.output):
        raise CheckpointError(f"{args.output}: is the checkpoint itself; choose another name for the output")
    check_output(args.output, CONVERTED, inputs=[args.checkpoint], overwrite=args.overwrite)
    source = read_checkpoint(checkpoint)
    weights, new = (source, []) if args.num_classes is None else add_head(source, args.num_classes, args.seed)
    to = get_layout(args.to)
    if to.norm and not weights.head:
        weights, new = with_norm(weights), ["norm.weight", "norm.bias"]
    try:
        written = write_layout(weights, to.name)
        loading = to.loading(
            written, weights.config, f"FILE{SUFFIXES[0]}" if is_stream(args.output) else str(args.output)
        )
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error

    say(f"source: {checkpoint.path}, layout {source.layout}, {describe(source.config)}")
    if "weights" in checkpoint.metadata:
        say(f"weights: the file holds several sets; taken: {checkpoint.metadata['weights']}")
    if source.widened:
        say("precision: 16-bit weights are written as float32, which loses nothing")
    kept = [name for name, _ in source if to.name_of(name) in written and name not in new]
    rows = (full_table if args.verbose else table)(source, kept, to, (checkpoint.state_dict, written))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    say(f"mapped to {to.name}:")
    for row in rows:
        say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    say(f"dropped: {listed([name for name, _ in source if name not in kept], args.verbose)}")
    if "decoder" in to.parts:
        without = [] if source.decoder else [*DECODER_PARTS]
        say(f"missing in the source, so not in the file: {', '.join(without) or 'nothing'}")
    if "head" in to.parts:
        absent = [f"{part}.{end}" for part in HEAD_PARTS for end in ("weight", "bias")]
        absent = [name for name in absent if name not in weights.head]
        say(f"new, freshly initialised: {listed(new, args.verbose)}")
        say(f"new, left to fine-tuning (not in the file): {listed(absent, args.verbose)}")

    if args.verify:
        verification = verify_conversion(checkpoint.state_dict, written, args.seed)
        if not verification.passed:
            raise CheckpointError(
                f"{checkpoint.path}: sparse and dense network differ, nothing written: {verification}"
            )
        say(f"verified: {verification}")
    metadata = {key: value for key, value in checkpoint.metadata.items() if key != "weights"}
    metadata |= {"converted_from": source.layout, "layout": to.name}
    with output_file(args.output, stream_suffix=SUFFIXES[0]) as path:
        save_checkpoint(path, written, output_config(weights, to, checkpoint.config), metadata)
    say(f"written: {args.output}, {len(written)} tensors, {sum(t.numel() for t in written.values()):,} parameters")
    for line in loading:
        say(line)


if __name__ == "__main__":
    _cli.run(main)

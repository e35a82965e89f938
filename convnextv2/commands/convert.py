"""Turn a pre-training checkpoint into the ordinary dense network's weights, and check that both compute the same."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnextv2.commands import _cli
from convnextv2.export.refusal import ExportError
from convnextv2.export.target import Target
from convnextv2.export.targets import TARGETS
from convnextv2.outputs import Kind, check_output, is_stream, output_file, output_path
from convnextv2.weights.guard import SUFFIXES, CheckpointError
from convnextv2.weights.layout import DECODER_PARTS, HEAD_PARTS, Layout
from convnextv2.weights.layouts import LAYOUTS, get_layout

if TYPE_CHECKING:
    from torch import Tensor

    from convnextv2.weights.reading import Weights
    from convnextv2.weights.stated import Config

    Tensors = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    """In the source, and as written."""


def _was_converted(path: Path) -> bool:
    from convnextv2.weights.checkpoint import load_checkpoint

    try:
        return "converted_from" in load_checkpoint(path).metadata
    except CheckpointError:
        return False


CONVERTED = Kind("a converted checkpoint", SUFFIXES, _was_converted)
FILE_SUFFIXES = (*SUFFIXES, *(suffix for target in TARGETS.values() for suffix in target.suffixes))


def parse_arguments() -> argparse.Namespace:
    """The options, checked."""
    targets = [layout for layout in LAYOUTS.values() if layout.target]
    formats: list[Layout | Target] = [*targets, *TARGETS.values()]
    parser = _cli.Parser(
        description=__doc__,
        epilog="The source may be one of our checkpoints or run folders, an official sparse (MinkowskiEngine) or dense "
        "checkpoint, or weights of timm or transformers; its layout, depths, widths, channels and patch size are read "
        "from the weights.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=_cli.checkpoint, help="file, run folder, published name or address"
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        type=output_path,
        help="file to write: .safetensors, .pth or .pt, for onnx .onnx, for torch-export .pt2; for transformers a "
        "folder; - for standard output",
    )
    parser.add_argument(
        "--to",
        choices=[*(layout.name for layout in targets), *TARGETS],
        default="official-dense",
        help="layout or format to write, official-dense by default: "
        f"{'; '.join(f'{own.name}, {own.about}' for own in formats)}",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="add a final norm if there is none and a fresh head for N classes, so that the file holds a whole "
        "classifier; without it, norm and head are written only if the source has them",
    )
    parser.add_argument(
        "--flat",
        action="store_true",
        help="write the state dict alone, as torch.save(model.state_dict()) does: for programs that load it as it is; "
        "such a .pth says nothing of the images and classes, and is replaced with --overwrite",
    )
    parser.add_argument(
        "--seed", type=_cli.seed, default=0, help="of the fresh head, and of the image and mask of --verify (0)"
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
    suffixes = TARGETS[args.to].suffixes if args.to in TARGETS else SUFFIXES
    if suffixes and not is_stream(args.output) and args.output.suffix not in suffixes:
        parser.error(f"OUTPUT must end in {', '.join(suffixes)}, got {str(args.output)!r}")
    if not suffixes and args.output.suffix in FILE_SUFFIXES:
        parser.error(f"OUTPUT is a folder for {args.to}, got {str(args.output)!r}")
    if args.flat and (args.to in TARGETS or args.output.suffix == SUFFIXES[0]):
        parser.error("--flat is for layouts of weights, in a .pth or .pt file; .safetensors is flat by itself")
    headless = [layout.name for layout in targets if "head" not in layout.parts]
    if args.num_classes is not None and (args.num_classes < 1 or args.to in headless):
        parser.error(
            f"--num-classes needs a number of at least 1, and a layout with a head (not {', '.join(headless)})"
        )
    return args


def still_true(metadata: Mapping[str, Any], new: Sequence[str]) -> dict[str, Any]:
    """What was said about weights that also holds with those that are ``new``: classes and scores are a head's."""
    if not any(name.startswith("head.") for name in new):
        return dict(metadata)
    return {key: value for key, value in metadata.items() if not key.startswith(("classes", "class_names", "val_"))}


def add_head(weights: Weights, num_classes: int, seed: int) -> tuple[Weights, list[str]]:
    """The weights with a fresh head and, where there is none, a fresh final norm; and the names that are new."""
    import torch

    from convnextv2.models.classifier import ConvNeXtV2
    from convnextv2.models.config import ClassifierConfig
    from convnextv2.models.pooling import pooling_of

    torch.manual_seed(seed)
    pooling = pooling_of(weights.head, weights.config.dims)
    whole = ConvNeXtV2(ClassifierConfig(weights.config, num_classes, pooling=pooling)).state_dict()
    head = {name: whole[name] for name in whole if name.split(".")[0] in HEAD_PARTS}
    kept = {name: tensor for name, tensor in weights.head.items() if name.startswith("norm.")}
    return replace(weights, head=head | kept), [name for name in head if name not in kept]


def part_of(name: str) -> str:
    """The part of the network that a tensor of the dense network belongs to."""
    first, second = (*name.split("."), "")[:2]
    if first == "downsample_layers":
        return "stem" if second == "0" else f"downsampling {second}"
    return f"stage {int(second) + 1}" if first == "stages" else {"norm": "final norm"}.get(first, first)


def table(weights: Weights, kept: list[str], to: Layout, tensors: Tensors) -> list[tuple[str, ...]]:
    """Rows that tell what became of each part: its name, tensors, parameters, and the names of the first tensor."""
    rows: dict[str, tuple[int, int, str]] = {}
    for name in kept:
        origin, target = weights.names[name], to.name_of(name)
        count, numbers, first = rows.get(part_of(name), (0, 0, f"{origin} -> {target}" if origin != target else origin))
        rows[part_of(name)] = (count + 1, numbers + tensors[1][target].numel(), first)
    header = ("part", "tensors", "parameters", "first of them")
    return [header, *((part, str(count), f"{numbers:,}", first) for part, (count, numbers, first) in rows.items())]


def full_table(weights: Weights, kept: list[str], to: Layout, tensors: Tensors) -> list[tuple[str, ...]]:
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


def output_config(weights: Weights, to: Layout, original: Config | None, new: list[str]) -> Config:
    """The configuration to store: of the source where the decoder is kept, else of what the layout holds, with names of
    the classes where none of the head is ``new``."""
    from convnextv2.models.config import ClassifierConfig
    from convnextv2.weights.reading import weights_config
    from convnextv2.weights.stated import stated_names

    left_out: dict[str, Any] = {part: {} for part in ("decoder", "head") if part not in to.parts}
    kept = replace(weights, **left_out)
    if original is not None and kept.decoder:
        return original
    found = weights_config(kept)
    if isinstance(found, ClassifierConfig) and not new:
        return replace(found, class_names=stated_names(original, found.num_classes))
    return found


def report(
    args: argparse.Namespace, source: Weights, weights: Weights, new: list[str], to: Layout, tensors: Tensors
) -> list[str]:
    """Lines that tell what became of every part of the source."""
    kept = [name for name, _ in source if to.name_of(name) in tensors[1] and name not in new]
    rows = (full_table if args.verbose else table)(source, kept, to, tensors)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"mapped to {to.name}:"]
    lines += [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.append(f"dropped: {listed([name for name, _ in source if name not in kept], args.verbose)}")
    if "decoder" in to.parts:
        without = [] if source.decoder else [*DECODER_PARTS]
        lines.append(f"missing in the source, so not in the file: {', '.join(without) or 'nothing'}")
    if "head" in to.parts:
        absent = [f"{part}.{end}" for part in HEAD_PARTS for end in ("weight", "bias")]
        absent = [name for name in absent if name not in weights.head]
        lines.append(f"new, freshly initialised: {listed(new, args.verbose)}")
        lines.append(f"new, left to fine-tuning (not in the file): {listed(absent, args.verbose)}")
    return lines


def main() -> None:
    """Parse, convert, verify, write."""
    args = parse_arguments()
    target = TARGETS.get(args.to)

    import torch

    from convnextv2.export import check_place, export, source_of
    from convnextv2.weights.checkpoint import load_checkpoint, save_checkpoint
    from convnextv2.weights.reading import describe, read_checkpoint, with_norm, write_layout
    from convnextv2.weights.verify import verify_conversion

    if target is not None:
        target.check_packages()
    checkpoint = load_checkpoint(args.checkpoint)
    say = _cli.warn if is_stream(args.output) else _cli.say
    if args.output.exists() and checkpoint.path.samefile(args.output):
        raise CheckpointError(f"{args.output}: is the checkpoint itself; choose another name for the output")
    if target is None:
        check_output(args.output, CONVERTED, inputs=[args.checkpoint], overwrite=args.overwrite)
    else:
        check_place(target, args.output, [args.checkpoint], args.overwrite)
    source = read_checkpoint(checkpoint)
    weights, new = (source, []) if args.num_classes is None else add_head(source, args.num_classes, args.seed)
    to = get_layout(args.to if target is None else target.layout)
    if to.norm and not weights.head:
        weights, new = with_norm(weights), ["norm.weight", "norm.bias"]
    suffix = "".join((SUFFIXES if target is None else target.suffixes)[:1])
    shown = f"FILE{suffix}" if is_stream(args.output) else str(args.output)
    try:
        written = write_layout(weights, to.name)
        loading = to.loading(written, weights.config, shown) if target is None else []
        if args.flat:
            loading = [line.replace(f"torch.load({shown!r})['model']", f"torch.load({shown!r})") for line in loading]
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error

    say(f"source: {checkpoint.path}, layout {source.layout}, {describe(source.config)}")
    if "weights" in checkpoint.metadata:
        say(f"weights: the file holds several sets; taken: {checkpoint.metadata['weights']}")
    if source.widened:
        say("precision: 16-bit weights are written as float32, which loses nothing")
    for line in report(args, source, weights, new, to, (checkpoint.state_dict, written)):
        say(line)

    if args.verify:
        verification = verify_conversion(checkpoint.state_dict, written, args.seed)
        if not verification.passed:
            raise CheckpointError(
                f"{checkpoint.path}: sparse and dense network differ, nothing written: {verification}"
            )
        say(f"verified: {verification}")
    if target is None:
        metadata = {key: value for key, value in still_true(checkpoint.metadata, new).items() if key != "weights"}
        metadata |= {"converted_from": source.layout, "layout": to.name}
        with output_file(args.output, stream_suffix=SUFFIXES[1 if args.flat else 0]) as path:
            if args.flat:
                torch.save({name: tensor.clone().contiguous() for name, tensor in written.items()}, path)
            else:
                save_checkpoint(path, written, output_config(weights, to, checkpoint.config, new), metadata)
    else:
        exported = source_of(checkpoint, weights)
        if new:
            exported = replace(exported, class_names=(), metadata=still_true(exported.metadata, new))
        options = {"check": args.verify, "seed": args.seed, "overwrite": args.overwrite}
        try:
            found = export(exported, target.name, args.output, **options)
        except ExportError as error:
            raise ExportError(f"{checkpoint.path}: {error}") from error
        if found:
            say(f"verified in {target.name}: {found}")
        loading = target.loading(exported, shown)
    say(f"written: {args.output}, {len(written)} tensors, {sum(t.numel() for t in written.values()):,} parameters")
    for line in loading:
        say(line)

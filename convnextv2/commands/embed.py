"""Write features of images to a file, and show what the features take for alike.

CHECKPOINT is of pre-training or classification, a run folder, or an encoder in an ONNX file. DATA is a folder of
images, labelled by its first folders or not, one image, or 'digits'. Images that cannot be read are left out and told.
Examples:
  fcmae embed runs/pretrain photos --output features.npz
  fcmae embed runs/finetune photos --pooling model --output features.parquet
  fcmae embed runs/pretrain photos --neighbours 5 --outliers 20 --map map.png
  fcmae embed encoder.onnx photos --per-patch --dtype float16
--neighbours and --outliers write a table and a picture beside the output: features_neighbours.csv, .png and so on.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from convnextv2.commands import _cli
from convnextv2.data.decoding import Wanted
from convnextv2.evaluation.choices import DTYPES, EMBEDDINGS, METHODS, OUTLIER_NEIGHBOURS
from convnextv2.evaluation.feature_files import FEATURES, why_no_file
from convnextv2.outputs import Kind, check_output, is_stream, output_path, output_text

if TYPE_CHECKING:
    from torch import Tensor

    from convnextv2.data.whole import WholeDataset
    from convnextv2.evaluation.embedding import Embedded, Embedder

ROWS, COLUMNS = 12, 9
"""Images in a picture, and neighbours of each, at most."""
NEIGHBOURS = ("file", "class", "rank", "neighbour", "neighbour_class", "cosine_similarity")
OUTLIERS = ("rank", "file", "class", "distance", "nearest", "nearest_class", "cosine_similarity")


def _table(header: Sequence[str]) -> Kind:
    return Kind(f"a table of {header[0]}s", (".csv",), lambda path: _cli.starts_with(path, ",".join(header).encode()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, embed, show."""
    options = parse(arguments)

    from convnextv2.data.windows import MOSTLY_NO_DATA
    from convnextv2.evaluation.embedding import embed, load_embedder
    from convnextv2.evaluation.projection import project
    from convnextv2.report.embedding import save_map, short

    places = beside(options)
    inputs = [options.checkpoint, options.data]
    for path, kind in places.items():
        check_output(path, kind, inputs=inputs, overwrite=options.overwrite)
    report = _cli.warn if any(map(is_stream, places)) else _cli.say

    embedder = load_embedder(
        options.checkpoint, pooling=options.pooling, device=options.device, img_size=options.img_size
    )
    dataset = embedder.dataset(options.data, Wanted(options.max_pixels, window=options.window))
    _cli.say_skipped(dataset.skipped)
    found = embed(
        embedder,
        dataset,
        options.output,
        per_patch=options.per_patch,
        dtype=options.dtype,
        keep=len(places) > 1,
        batch_size=options.batch_size,
        workers=options.workers,
        progress=partial(_cli.progress, description="embed"),
    )
    without = sum(reason == MOSTLY_NO_DATA for _, reason in found.unreadable)
    unreadable = [(file, reason) for file, reason in found.unreadable if reason != MOSTLY_NO_DATA]
    _cli.say_skipped(unreadable)
    pooling = embedder.about["pooling"]
    what = "every patch" if options.per_patch else f"pooling: {pooling}"
    left_out = f", {without} windows mostly without data" if options.window else ""
    report(f"{len(found)} images embedded, {len(unreadable)} unreadable{left_out} ({what}): {options.output}")
    if options.map is not None:
        title = f"{len(found)} images, features of {short(embedder.about['checkpoint'], 60)} (pooling: {pooling})"
        save_map(options.map, project(found.values, options.map_by, seed=options.seed), found, title)
        report(f"map: {options.map}")
    if options.neighbours or options.outliers:
        alike(options, embedder, dataset, found, report)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked against each other and against what is installed."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=_cli.checkpoint, help="of any kind: file, run folder, name, address; .onnx")
    parser.add_argument("data", metavar="DATA", help="folder of images, an image, or 'digits'")
    _cli.add_output(parser, "features.npz", "file to write: .npz or .parquet; - for standard output, an .npz")
    text = (
        "mean or mean_std over the last map's cells; stages: that of all maps; model: as the head has it; default: mean"
    )
    parser.add_argument("--pooling", choices=EMBEDDINGS, help=text)
    parser.add_argument("--per-patch", action="store_true", help="write the last feature map, [h, w, D] an image")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the file; default: float32")
    text = "write the K nearest of every image by cosine similarity, and draw some"
    parser.add_argument("--neighbours", type=_cli.positive_int, metavar="K", help=text)
    text = f"write the K images farthest from their {OUTLIER_NEIGHBOURS} nearest, and draw them"
    parser.add_argument("--outliers", type=_cli.positive_int, metavar="K", help=text)
    parser.add_argument("--map", type=output_path, metavar="FILE", help="PNG file to draw all images in as points")
    parser.add_argument("--map-by", choices=METHODS, default="pca", help="how they are placed; default: pca")
    parser.add_argument("--seed", type=_cli.seed, default=0, help="of a map by umap; default: 0")
    _cli.add_reading(parser)
    options = parser.parse_args(arguments)

    from convnextv2.evaluation.projection import why_no_map

    if options.per_patch and options.pooling in ("model", "stages"):
        parser.error(f"--per-patch writes the last map before it is pooled; leave --pooling {options.pooling} out")
    if options.per_patch and options.pooling and not (options.neighbours or options.outliers or options.map):
        parser.error("--per-patch writes maps that are not pooled; --pooling is then of neighbours, outliers and map")
    if is_stream(options.output) and (options.neighbours or options.outliers):
        parser.error("--neighbours and --outliers write beside --output; name a file there")
    reasons = [why_no_file(options.output), why_no_map(options.map_by) if options.map is not None else None]
    if reason := next(filter(None, reasons), None):
        parser.error(reason)
    return options


def beside(options: argparse.Namespace) -> dict[Path, Kind]:
    """Files that are written, and what they are. Raises ValueError if two are one."""
    from convnextv2.training.pictures import PICTURE

    places = [(options.output, FEATURES)]
    if options.map is not None:
        places.append((options.map, PICTURE))
    for name, header in (("neighbours", NEIGHBOURS), ("outliers", OUTLIERS)):
        if getattr(options, name):
            places += [(place(options, name, ".csv"), _table(header)), (place(options, name, ".png"), PICTURE)]
    if len({path.resolve() for path, _ in places}) < len(places):
        raise ValueError("--output, --map and what is written beside the output need places of their own")
    return dict(places)


def place(options: argparse.Namespace, name: str, suffix: str) -> Path:
    """Where a table or picture goes."""
    return options.output.with_name(f"{options.output.stem}_{name}{suffix}")


def alike(
    options: argparse.Namespace,
    embedder: Embedder,
    dataset: WholeDataset,
    found: Embedded,
    report: Callable[[str], None],
) -> None:
    """Tables and pictures of neighbours and outliers."""
    from convnextv2.data.datasets import spread
    from convnextv2.evaluation.neighbours import all_nearest, distances, farthest
    from convnextv2.report.embedding import save_alike

    wanted = max(options.neighbours or 0, OUTLIER_NEIGHBOURS if options.outliers else 0)
    progress = partial(_cli.progress, description="compare")
    similarity, numbers = all_nearest(found.values, wanted, device=options.device, progress=progress)
    shown = min(options.neighbours or COLUMNS, COLUMNS)
    nearest = similarity[:, :shown], numbers[:, :shown]
    draw = partial(save_alike, features=found, found=nearest, mean=embedder.mean, std=embedder.std)

    def image(number: int) -> Tensor:
        return dataset[found.numbers[number]][0]

    if options.neighbours:
        count, path = min(options.neighbours, similarity.shape[1]), place(options, "neighbours", ".csv")
        write_table(path, NEIGHBOURS, neighbour_rows(found, similarity[:, :count], numbers[:, :count]))
        queries = spread(len(found), ROWS)[:ROWS]
        draw(place(options, "neighbours", ".png"), queries=queries, image=image)
        own, other = found.labels[:, None], found.labels[numbers[:, :count]]
        known = (own >= 0) & (other >= 0)
        same = f", {((own == other) & known).sum() / known.sum():.1%} of the same class" if known.any() else ""
        report(f"neighbours: {count} of each image{same}: {path} and .png")
    if options.outliers:
        far, path = farthest(similarity, options.outliers), place(options, "outliers", ".csv")
        apart = distances(similarity)
        write_table(path, OUTLIERS, outlier_rows(found, far, apart, similarity, numbers))
        before = [f"{apart[query]:.3f} " for query in far[:ROWS]]
        draw(place(options, "outliers", ".png"), queries=far[:ROWS], before=before, image=image)
        count = min(OUTLIER_NEIGHBOURS, similarity.shape[1])
        report(f"outliers: {len(far)} farthest, by mean cosine distance to {count} neighbours: {path} and .png")


def named(found: Embedded, number: int) -> tuple[str, str]:
    """An image's name and that of its class, or nothing, as cells that no spreadsheet runs."""
    label = int(found.labels[number])
    name = found.classes[label] if label >= 0 else ""
    return _cli.plain_name(str(found.files[number])), _cli.plain_cell(name)


def neighbour_rows(found: Embedded, similarity: Tensor, numbers: Tensor) -> Iterator[list[str]]:
    """A row for each image and neighbour, under :data:`NEIGHBOURS`."""
    for number, (values, others) in enumerate(zip(similarity, numbers, strict=True)):
        for rank, (value, other) in enumerate(zip(values.tolist(), others.tolist(), strict=True), 1):
            own = [*named(found, number), str(rank)]
            yield [*own, *named(found, other), f"{value:.6f}"]


def outlier_rows(
    found: Embedded, far: Sequence[int], apart: Tensor, similarity: Tensor, numbers: Tensor
) -> Iterator[list[str]]:
    """A row for each outlier, under :data:`OUTLIERS`."""
    for rank, number in enumerate(far, 1):
        other = int(numbers[number, 0])
        own = [str(rank), *named(found, number), f"{apart[number]:.6f}"]
        yield [*own, *named(found, other), f"{similarity[number, 0]:.6f}"]


def write_table(path: Path, header: Sequence[str], rows: Iterator[list[str]]) -> None:
    """A table of text."""
    with output_text(path) as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows(rows)

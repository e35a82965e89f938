"""Write a folder of images into tar shards, as WebDataset has them: few large files instead of many small ones.

Files go in as they are, and labels as numbers of the classes, where all images have one. The output is read in place of
the folder by training, fcmae evaluate and fcmae embed, as a whole (--data shards) or by name
(--data 'shards/{000000..000012}.tar', https://…/{000000..000012}.tar), with the same samples in the same order.
Examples:
  fcmae shards photos shards
  fcmae shards photos shards --samples 5000 --shuffle 0
  fcmae shards 'data/train-*.parquet' shards
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from convnextv2.commands import _cli
from convnextv2.data.tar_index import index_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, write, tell."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", help="folder of images, of class folders, or of train and val with these; or parquet, hf://…, a list"
    )
    parser.add_argument("output", type=Path, help="folder to write, which is not there yet")
    parser.add_argument("--samples", type=_cli.positive_int, default=1000, help="in a shard, at most (default: 1000)")
    parser.add_argument("--in-chans", type=_cli.positive_int, default=3, help="channels of the images (default: 3)")
    parser.add_argument("--shuffle", type=_cli.seed, metavar="SEED", help="shuffle; default: the folder's order")
    o = parser.parse_args(arguments)

    from convnextv2.data.shard_writing import write_shards

    shown = partial(_cli.progress, description="shards")
    opened, written = write_shards(
        o.data, o.output, in_chans=o.in_chans, samples=o.samples, shuffle=o.shuffle, progress=shown
    )
    parts = [part for part in (opened.train, opened.val) if part is not None]
    for part in parts:
        _cli.say_skipped(part.skipped)
    if opened.train.labels is None:
        _cli.say("notice: without labels: not every image lies in the folder of a class")
    images, size = sum(len(index_of(path).names) for path in written), sum(path.stat().st_size for path in written)
    _cli.say(f"{images:,} images in {len(written)} shard(s), {size / 1e6:,.1f} MB: {o.output}")

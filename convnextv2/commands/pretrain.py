"""Pre-train ConvNeXt V2 with masked images (FCMAE) on a folder of images or on the embedded digits.

Writes to OUTPUT: checkpoints/last.safetensors, metrics.jsonl, loss.png, neighbours.png, reconstructions/, config.yaml,
and the state that --resume continues from. Examples:
  fcmae pretrain --data photos --output runs/pretrain --img-size 128 --patch-size 16
  fcmae pretrain --data photos --probe labelled --output runs/pretrain
  fcmae pretrain --config digits --output runs/digits
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from convnextv2.commands import _cli
from convnextv2.training import PretrainOptions
from convnextv2.training.recipe import parse_options

if TYPE_CHECKING:
    from convnextv2.training import PretrainResult


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, train, report."""
    options = parse_options(PretrainOptions, arguments, __doc__ or "")

    from convnextv2.training import pretrain

    return _cli.train(pretrain, options, came_to)


def came_to(result: PretrainResult) -> str:
    """What a run came to, in a line."""
    last = result.folder / "checkpoints" / "last.safetensors"
    if not result.metrics:  # of a finished run, taken away
        return f"{result.epochs} epochs are done: {last}"
    change = 100 * (1 - result.last_loss / result.first_loss)
    verb = "fell" if change >= 0 else "rose"
    return (
        f"loss {verb} from {result.first_loss:.4f} to {result.last_loss:.4f} ({abs(change):.1f} %) in {result.epochs} "
        f"epochs: {last}"
    )

"""Pre-train ConvNeXt V2 with masked images (FCMAE) on a folder of images or on the embedded digits.

Writes to OUTPUT: checkpoints/last.safetensors, metrics.jsonl, loss.png, reconstructions/, config.yaml, and the state
that --resume continues from. Examples:
  pretrain.py --data photos --output runs/pretrain --img-size 128 --patch-size 16
  pretrain.py --config configs/digits_pretrain.yaml --output runs/digits
"""

from __future__ import annotations

from collections.abc import Sequence

import _cli

from convnextv2.training import PretrainOptions, RunStoppedError, pretrain
from convnextv2.training.recipe import parse_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, train, report."""
    options = parse_options(PretrainOptions, arguments, __doc__ or "")
    try:
        result = pretrain(options, log=_cli.warn, progress=_cli.progress)
    except RunStoppedError as stopped:
        _cli.warn(str(stopped))
        return stopped.status
    last = result.folder / "checkpoints" / "last.safetensors"
    if not result.metrics:  # of a finished run, taken away
        _cli.say_once(f"{result.epochs} epochs are done: {last}")
        return 0
    change = 100 * (1 - result.last_loss / result.first_loss)
    verb = "fell" if change >= 0 else "rose"
    _cli.say_once(
        f"loss {verb} from {result.first_loss:.4f} to {result.last_loss:.4f} ({abs(change):.1f} %) in {result.epochs} "
        f"epochs: {last}"
    )
    return 0


if __name__ == "__main__":
    _cli.run(main)

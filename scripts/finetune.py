"""Fine-tune a ConvNeXt V2 classifier on a folder of classes, or on the embedded digits.

DATA holds one subfolder a class, or train/ and val/ folders that do. --init takes any checkpoint: of pretrain.py, a
converted one, or a published one; without it the network starts from scratch. Writes to OUTPUT:
checkpoints/best.safetensors and last.safetensors, class_indices.json, metrics.jsonl, loss.png, confusion_matrix.png,
config.yaml, and the state that --resume continues from. Examples:
  finetune.py --data photos --init runs/pretrain --output runs/finetune
  finetune.py --config configs/digits_finetune.yaml --init runs/digits --output runs/digits-finetune
"""

from __future__ import annotations

from collections.abc import Sequence

import _cli

from convnextv2.training import FinetuneOptions, RunStoppedError, finetune
from convnextv2.training.recipe import parse_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, train, report."""
    options = parse_options(FinetuneOptions, arguments, __doc__ or "")
    try:
        result = finetune(options, log=_cli.warn, progress=_cli.progress)
    except RunStoppedError as stopped:
        _cli.warn(str(stopped))
        return stopped.status
    _cli.say_once(
        f"best top-1 {result.best_top1:.2f} % on {result.val_images} validation images (epoch {result.best_epoch} of "
        f"{result.epochs}): {result.folder / 'checkpoints' / 'best.safetensors'}"
    )
    return 0


if __name__ == "__main__":
    _cli.run(main)

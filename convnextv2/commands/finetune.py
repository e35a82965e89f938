"""Fine-tune a ConvNeXt V2 classifier on a folder of classes, or on the embedded digits.

DATA holds one subfolder a class, or train/ and val/ folders that do. --init takes any checkpoint: of fcmae pretrain, a
converted one, or a published one; without it the network starts from scratch. Writes to OUTPUT:
checkpoints/best.safetensors and last.safetensors, class_indices.json, metrics.jsonl, loss.png, confusion_matrix.png,
config.yaml, and the state that --resume continues from. Examples:
  fcmae finetune --data photos --init runs/pretrain --output runs/finetune
  fcmae finetune --config digits --init runs/digits --output runs/digits-finetune
"""

from __future__ import annotations

from collections.abc import Sequence

from convnextv2.commands import _cli
from convnextv2.training import FinetuneOptions
from convnextv2.training.recipe import parse_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, train, report."""
    options = parse_options(FinetuneOptions, arguments, __doc__ or "")

    from convnextv2.training import finetune

    return _cli.train(finetune, options, lambda result: _cli.best_line(f"top-1 {result.best_top1:.2f}", result))

"""A network as prediction runs it: where its images come from, and what suits the device."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from convnextv2.data.batches import PredictBytes, constants, memory_format, normalised, take_apart
from convnextv2.data.datasets import PredictDataset
from convnextv2.data.loading import make_loader
from convnextv2.evaluation.choices import PRECISIONS


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type to compute in beside float32, if any: as in training ``auto`` is bfloat16 on a GPU that has it.

    Raises:
        ValueError: if there is no such precision, or not on that device.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"`precision` fp16 needs a GPU, got the device {device}; use `precision` no or bf16")
    if precision == "auto":
        has = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has else None
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


class Inference:
    """Batches of a data set, and what a network says about them.

    The network is given channels last on a GPU, in place, and stays so.

    Args:
        model: in evaluation mode, on its device.
        precision: see :func:`autocast_dtype`.
        compile: mode of ``torch.compile``; None for not at all. All batches then have the same size.
    """

    def __init__(
        self, model: nn.Module, dataset: PredictDataset, batch_size: int, *, precision: str, compile: str | None
    ) -> None:
        self.device = next(model.parameters()).device
        self.dataset, self.batch_size = dataset, batch_size
        self._dtype = autocast_dtype(precision, self.device)
        self._format = memory_format(self.device, channels_last=True)
        self._pads = compile is not None
        model = model.to(memory_format=self._format)  # type: ignore[call-overload]  # torch says it may stand alone
        self._model: Any = model if compile is None else torch.compile(model, mode=compile)
        self._taken = take_apart(dataset.transform)
        self._constants = constants(self._taken.statistics, self.device) if self._taken else None

    def batches(self, workers: int | None) -> Any:
        """Loader of (images, numbers, reasons); ``workers`` processes decode, None takes up to four where there are
        eight batches or more."""
        if workers is None:
            workers = min(4, os.cpu_count() or 1) if len(self.dataset) >= 8 * self.batch_size else 0
        samples = self.dataset if self._taken is None else PredictBytes(self.dataset, self._taken)
        return make_loader(samples, self.batch_size, workers)

    def probabilities(self, images: Tensor) -> Tensor:
        """float32 ``[B, K]``, on the processor, of a batch of :meth:`batches`."""
        return self.outputs(images).softmax(1).cpu()

    def outputs(self, images: Tensor) -> Tensor:
        """What the network says of a batch of :meth:`batches`: float32 ``[B, K]``, on its device."""
        count = len(images)
        images = images.to(self.device, non_blocking=True)
        if self._constants is not None:
            images = normalised(images, *self._constants, self._format)
        if self._pads and count < self.batch_size:
            images = torch.cat([images, images.new_zeros(self.batch_size - count, *images.shape[1:])])
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            outputs = self._model(images)
        return outputs[:count].float()

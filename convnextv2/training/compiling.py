"""Whether and how the network of a run is compiled: as asked, or with CUDA graphs where they suit and work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convnextv2.messages import one_line
from convnextv2.models.fcmae import FCMAE
from convnextv2.training.device import Accelerator
from convnextv2.training.options import RunOptions
from sparse_ops.registry import resolve_backend

GRAPHS = "reduce-overhead"
TRIED = 3
"""Passes of a first batch: torch warms up for a CUDA graph in the first, records it in the second and plays it in the
third."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Compiling:
    """The network of a run, compiled as its options ask. ``auto`` asks for CUDA graphs in pre-training on a GPU.

    Args:
        model: the network.
        wrapped: the same as accelerate prepared it.
        options: of the run.
        accelerator: what prepared it.
        say: takes lines for the user.
    """

    def __init__(
        self, model: Any, wrapped: Any, options: RunOptions, accelerator: Accelerator, say: Callable[[str], None]
    ) -> None:
        # A network that has a method of its own knows what to leave out.
        self._network: Any = model if type(model).compile is not nn.Module.compile else wrapped
        self._wrapped, self._accelerator, self._say = wrapped, accelerator, say
        self._untried = options.compile == "auto" and self._suits(model, options)
        mode = GRAPHS if self._untried else options.compile
        if mode not in (None, "none", "auto"):
            self._network.compile(mode=mode)

    def loss(self, loss_of: Callable[[Any, Any], tuple[Tensor, int]], batch: Any) -> tuple[Tensor, int]:
        """``loss_of(network, batch)``. What ``auto`` compiled is tried before the first one, without a trace in it."""
        if self._untried:
            self._untried = False
            self._try(batch)
        return loss_of(self._wrapped, batch)

    def _suits(self, model: nn.Module, options: RunOptions) -> bool:
        if self._accelerator.device.type != "cuda" or not isinstance(model, FCMAE):
            return False
        problem = obstacle(model, options, self._accelerator)
        self._say(
            f"notice: no CUDA graphs (`compile` auto): {problem}"
            if problem
            else "notice: the first step takes minutes, in which CUDA graphs are compiled; `compile` none does without"
        )
        return problem is None

    def _try(self, batch: Tensor) -> None:
        """A few passes of forward and backward, or else the network as it was."""
        device = self._accelerator.device
        parameters = list(self._wrapped.parameters())
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                for _ in range(TRIED):
                    self._wrapped(batch, return_pred=False).loss.backward()
                    _drop_gradients(parameters)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # what a kernel does wrong is told here
        except Exception as error:  # whatever torch.compile raises, it is told and the run goes on without
            self._network.compile(disable=True)
            _drop_gradients(parameters)
            torch.compiler.reset()  # the memory of graphs too
            told = one_line(f"{type(error).__name__}: {error}")
            self._say(f"notice: going on without CUDA graphs (`compile` auto), which fail here: {told[:300]}")


def obstacle(model: FCMAE, options: RunOptions, accelerator: Accelerator) -> str | None:
    """Why CUDA graphs are not for a pre-training on a GPU, or None.

    Raises BackendUnavailableError if a backend is named that cannot run there.
    """
    if options.accum > 1:
        return "with `accum` a graph overwrites the gradients of the batch before"
    if accelerator.num_processes > 1:
        return f"they are for one process, and this run has {accelerator.num_processes}"
    dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
    backend = resolve_backend(model.backend, accelerator.device, dtype, model.config.encoder.kernel_size)
    return None if backend.name == "triton" else f"they are for the backend triton, and {backend.name} runs"


def _drop_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None

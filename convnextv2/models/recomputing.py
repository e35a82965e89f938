"""Gradient checkpointing: blocks keep their input alone, and compute the rest again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FLAG = "grad_checkpointing"
_CONFIG = "skip_fwd_side_effects_in_bwd_under_checkpoint"


class Recomputing(nn.Module):
    """A network whose stages, or those below it, can be told to recompute."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the blocks' inputs and recompute what is between them in the backward pass: less memory, one more
        forward pass of the encoder's time. Losses and gradients are the same to the bit. As timm's models have it."""
        for module in self.modules():
            if hasattr(type(module), FLAG):
                setattr(module, FLAG, enable)


def recomputed(block: nn.Module, x: Tensor, grid: Any) -> Tensor:
    """``block(x, grid)``, of which the backward pass needs ``x`` alone; nothing else where there will be none.

    Hooks of the block are called again. Numbers that it draws from torch's generators are drawn again alike.
    """
    if not torch.is_grad_enabled():
        return block(x, grid)
    found: Tensor = checkpoint(block, x, grid, use_reentrant=False)
    return found


def compiles_recomputing() -> bool:
    """Whether torch.compile takes a masked autoencoder that recomputes: some version from 2.9 on does."""
    return hasattr(torch._dynamo.config, _CONFIG)


def tracing_tables(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function whose blocks may make tables of an active set while they are recomputed.

    The tables are kept, for the blocks behind them, and torch has to be told that the backward pass need not keep
    them again.
    """

    def call(*arguments: Any) -> Any:
        with torch._dynamo.config.patch({_CONFIG: True}):
            return compiled(*arguments)

    return call if compiles_recomputing() else compiled

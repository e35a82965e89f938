"""Bytes of what a forward pass keeps for the backward pass; by itself, the table of docs/scaling.md."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from convnextv2 import create_fcmae, create_model
from convnextv2.models.encoder import Block


def kept_bytes(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Of all storages that are saved, but for parameters, and of the inputs of blocks, which checkpoints keep."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    def keep_input(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        keep(given[0])

    blocks = [module for module in model.modules() if isinstance(module, Block)]
    handles = [block.register_forward_pre_hook(keep_input) for block in blocks]
    torch.manual_seed(0)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model)
    for handle in handles:
        handle.remove()
    return sum(storage.nbytes() for storage in kept.values())


def main() -> None:
    """For atto and eight images of 224 × 224 pixels, without and with gradient checkpointing."""
    images = torch.randn(8, 3, 224, 224)
    for backend in ("cpu", "reference"):
        tell(f"pre-training, {backend}", both(create_fcmae("atto", backend=backend), lambda own: own(images).loss))
    for backend in ("cpu", "torch"):
        tell(f"fine-tuning, {backend}", both(create_model("atto", backend=backend), lambda own: own(images).sum()))


def tell(what: str, sizes: list[str]) -> None:
    sys.stdout.write(f"{what}: {', '.join(sizes)}\n")


def both(model: Any, loss: Callable[[nn.Module], Tensor]) -> list[str]:
    """Without and with, in MiB."""
    found = []
    for enable in (False, True):
        model.train().set_grad_checkpointing(enable)
        found.append(f"{kept_bytes(model, loss) / 2**20:.0f} MiB")
    return found


if __name__ == "__main__":
    main()

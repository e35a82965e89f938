"""Gradient checkpointing: the same losses and gradients to the bit, from less that is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from kept_for_backward import kept_bytes
from model_helpers import BACKENDS, tiny_config, tiny_fcmae
from torch import Tensor, nn

from convnextv2 import create_fcmae, create_model
from convnextv2.models.encoder import Block


def results(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """Loss and gradients, with the same numbers drawn every time."""
    torch.manual_seed(3)
    model.zero_grad()
    found = loss(model)
    found.backward()
    return [found.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    recomputing = copy.deepcopy(model)
    recomputing.set_grad_checkpointing()
    calls = []
    block = next(module for module in recomputing.modules() if isinstance(module, Block))
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    plain, again = results(model, loss), results(recomputing, loss)
    assert len(calls) == 2
    assert len(plain) == len(again) > 50
    assert all(map(torch.equal, plain, again))
    recomputing.set_grad_checkpointing(False)
    results(recomputing, loss)
    assert len(calls) == 3
    with torch.no_grad():
        recomputing.set_grad_checkpointing()
        loss(recomputing)
    assert len(calls) == 4


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "minkowski"])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_masked_autoencoder(backend: str, ragged: bool) -> None:
    model = tiny_fcmae(backend=backend, encoder={"drop_path_rate": 0.4}).train()
    images = torch.randn(3, 3, 32, 64)
    if ragged:
        mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1] * 8, [0] * 8])
        assert_same(model, lambda network: network(images, mask).loss)
    else:
        assert_same(model, lambda network: network(images, return_pred=False).loss)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_classifier(backend: str, autocast: bool) -> None:
    model = create_model(tiny_config(drop_path_rate=0.4), num_classes=3, backend=backend).train()
    nn.init.normal_(model.stages[0][0].grn.gamma)
    images = torch.randn(2, 3, 64, 96)

    def loss(network: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return network(images).float().square().mean()

    assert_same(model, loss)


def test_drop_path_takes_the_numbers_that_it_was_given_both_times() -> None:
    model = create_model(tiny_config(drop_path_rate=0.9), num_classes=3, backend="torch").train()
    for number, block in enumerate(module for module in model.modules() if isinstance(module, Block)):
        block.drop_path.noise = torch.linspace(0, 0.99, 4).roll(number)
    images = torch.randn(4, 3, 64, 64)
    assert_same(model, lambda network: network(images).square().mean())


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
def test_compiled_networks_recompute_too(dense: bool) -> None:
    config, images = tiny_config(depths=(1, 1, 2, 1)), torch.randn(3, 3, 64, 64)
    noise = torch.rand(3, 4)
    model: nn.Module
    if dense:
        model = create_model(config, num_classes=3).train()
    else:
        model = create_fcmae(config, img_size=64, decoder_dim=8, backend="cpu").train()
    recomputing = copy.deepcopy(model)
    recomputing.set_grad_checkpointing()
    torch._dynamo.reset()
    recomputing.compile(backend="aot_eager")

    def loss(network: nn.Module) -> Tensor:
        found: Tensor = network(images).square().mean() if dense else network(images, noise=noise).loss
        return found

    for plain, again in zip(results(model, loss), results(recomputing, loss), strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


def test_less_is_kept() -> None:
    """A block keeps its input alone, in place of all that its layers need."""
    config = tiny_config(depths=(2, 2, 2, 2))
    autoencoder = create_fcmae(config, img_size=128, decoder_dim=8, backend="reference")
    images = torch.randn(2, 3, 128, 128)
    for model, loss in (
        (create_model(config, num_classes=2, backend="torch"), lambda own: own(images).sum()),
        (autoencoder, lambda own: own(images).loss),
    ):
        before = kept_bytes(model, loss)
        model.set_grad_checkpointing()
        assert kept_bytes(model, loss) < before / 2

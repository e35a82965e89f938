"""The classifier beside timm's, transformers' and the official dense network of the same weights, at every size.

Float32, on the kernels that a user of a processor gets: outputs, gradients of every parameter, gradient of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import timm
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional

from convnextv2 import VARIANTS, ConvNeXtV2, EncoderConfig, create_model
from convnextv2.models.config import encoder_config
from convnextv2.weights.evaluators import EPS, official_dense_features
from convnextv2.weights.reading import read_weights, write_layout

TOLERANCE = 1e-5
"""Largest error of a tensor, relative to its largest value."""
DEPTHS = {"convnextv2_huge": (1, 1, 3, 1)}
"""Of huge: at its widths. Whole, with a gradient for each weight on both sides, it takes 11 GB and over a minute."""
SLOW = {"convnextv2_large", "convnextv2_huge"}
Run = Callable[[Tensor], Tensor]


def classifier(name: str) -> ConvNeXtV2:
    """With every parameter random: GRN switched on, no zero biases, no symmetric kernels; features stay of size 1."""
    depths = DEPTHS.get(name)
    config = EncoderConfig(depths, VARIANTS[name][1]) if depths else encoder_config(name)
    with init_empty_weights():
        model = create_model(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".grn." in parameter_name:
                parameter.normal_(0.0, 0.5)
            elif parameter.dim() == 1:
                parameter.normal_(float(parameter_name.endswith("norm.weight")), 0.2)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    return model.eval()


def adopted(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let the network have the tensors as its parameters, in the same memory, in its own shapes; and its parameters."""
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    assert shapes.keys() == state.keys()
    network.load_state_dict({name: value.view(shapes[name]) for name, value in state.items()}, assign=True)
    network.eval().requires_grad_(True)
    return dict(network.named_parameters())


def timms(state: Mapping[str, Tensor], name: str, config: EncoderConfig) -> tuple[Run, dict[str, Tensor]]:
    with init_empty_weights():
        network = timm.create_model(name, **({"depths": config.depths} if name in DEPTHS else {}))
    return network, adopted(network, state)


def of_transformers(state: Mapping[str, Tensor], name: str, config: EncoderConfig) -> tuple[Run, dict[str, Tensor]]:
    shape = {"depths": list(config.depths), "hidden_sizes": list(config.dims), "num_labels": 1000}
    with init_empty_weights():
        network = transformers.ConvNextV2ForImageClassification(
            transformers.ConvNextV2Config(**shape, layer_norm_eps=EPS)
        )
    return lambda images: network(images).logits, adopted(network, state)


def official(state: Mapping[str, Tensor], name: str, config: EncoderConfig) -> tuple[Run, dict[str, Tensor]]:
    """The official dense network, written out in torch's functions."""
    own = {key: value.detach().clone().requires_grad_() for key, value in state.items()}

    def run(images: Tensor) -> Tensor:
        pooled = official_dense_features(own, config, images).mean((-2, -1))
        normed = functional.layer_norm(pooled, pooled.shape[-1:], own["norm.weight"], own["norm.bias"], EPS)
        return functional.linear(normed, own["head.weight"], own["head.bias"])

    return run, own


RIVALS: dict[str, Any] = {"timm": timms, "transformers": of_transformers, "official-dense": official}


def error(found: Tensor, expected: Tensor) -> float:
    assert found.numel() == expected.numel()
    assert expected.abs().max() > 0
    return float((found.flatten() - expected.flatten()).abs().max() / expected.abs().max())


def outcome(
    run: Run, parameters: Mapping[str, Tensor], images: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Outputs, and the gradients of a random functional of them for the images and the parameters by name."""
    images = images.clone().requires_grad_()
    outputs = run(images)
    pixels, *gradients = torch.autograd.grad((outputs * weights).sum(), [images, *parameters.values()])
    return outputs.detach(), pixels, dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in VARIANTS]
)
def test_outputs_and_gradients(name: str) -> None:
    ours = classifier(name)
    images, weights = torch.randn(1, 3, 64, 96), torch.randn(1, 1000)
    outputs, pixels, gradients = outcome(ours, dict(ours.named_parameters()), images, weights)
    state, mapped = read_weights(ours.state_dict()), read_weights(gradients)
    for layout, build in RIVALS.items():
        run, parameters = build(write_layout(state, layout), name, ours.encoder_config)
        theirs = outcome(run, parameters, images, weights)
        expected = write_layout(mapped, layout)  # names of gradients are those of weights
        assert theirs[2].keys() == expected.keys()
        errors = {key: error(expected[key], theirs[2][key]) for key in expected}
        errors |= {"outputs": error(outputs, theirs[0]), "images": error(pixels, theirs[1])}
        assert max(errors.values()) <= TOLERANCE, (layout, {k: v for k, v in errors.items() if v > TOLERANCE})
        del run, parameters, theirs


def test_an_error_of_one_tap_is_seen() -> None:
    """What the tolerance tells apart: one number of one depthwise kernel, off by a thousandth."""
    ours = classifier("convnextv2_atto")
    images, weights = torch.randn(1, 3, 64, 96), torch.randn(1, 1000)
    before = outcome(ours, dict(ours.named_parameters()), images, weights)
    with torch.no_grad():
        ours.stages[2][3].dwconv.weight[7, 0, 3, 4] += 1e-3
    after = outcome(ours, dict(ours.named_parameters()), images, weights)
    assert error(after[0], before[0]) > TOLERANCE
    assert error(after[1], before[1]) > TOLERANCE

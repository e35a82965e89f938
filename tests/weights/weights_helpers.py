"""Tiny networks with random weights, and the official sparse layout written out by hand."""

from __future__ import annotations

import re

import torch
from torch import nn

from convnextv2 import EncoderConfig, create_fcmae

ENCODER = EncoderConfig((1, 2, 1, 1), (8, 16, 16, 24))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that no kernel is symmetric and GRN does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return model.double().eval()


def fcmae(config: EncoderConfig = ENCODER):
    side = 4 * config.patch_size
    return randomise(create_fcmae(config, img_size=side, decoder_dim=16, decoder_depth=2, backend="reference"))


def sparse_official(model) -> dict[str, torch.Tensor]:
    """The official sparse layout of a masked autoencoder, written out by hand, tap by tap."""
    result = {}
    for name, value in model.state_dict().items():
        if re.search(r"encoder\.stages.*dwconv\.weight", name) or re.search(
            r"encoder\.downsample.*[123]\.1\.weight", name
        ):
            side = value.shape[-1]
            taps = [value[:, :, tap % side, tap // side] for tap in range(side * side)]
            kernel = torch.stack([tap[:, 0] if "dwconv" in name else tap.t() for tap in taps])
            result[name.replace(".weight", ".kernel")] = kernel
        elif re.search(r"encoder\.stages.*dwconv\.bias", name) or re.search(
            r"encoder\.downsample.*[123]\.1\.bias", name
        ):
            result[name] = value[None]
        elif re.search(r"encoder\.stages.*grn", name):
            result[name] = value[0, 0]
        elif re.search(r"encoder\.stages.*\.norm\.", name) or re.search(r"encoder\.downsample.*[123]\.0\.", name):
            result[re.sub(r"\.(weight|bias)$", r".ln.\1", name)] = value
        elif re.search(r"encoder\.stages.*pwconv", name):
            result[re.sub(r"\.(weight|bias)$", r".linear.\1", name)] = value
        else:
            result[name] = value
    return result


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)

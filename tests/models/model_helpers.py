"""Tiny networks and comparisons that the model tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convnextv2 import FCMAE, EncoderConfig, FCMAEConfig
from sparse_ops import Grid, SparseGrid, registry
from sparse_ops.oracle import MaskedDenseGrid, visible_from_text

RAGGED = visible_from_text("..#./#.#.", "####/####", ".#.#/##..")
UNIFORM = visible_from_text("..#./#.##", "#.#./..##", "####/....")
BACKENDS = [
    name
    for name, backend in registry().items()
    if backend.unavailable_reason() is None and backend.rejects(torch.device("cpu"), torch.float32, 7) is None
]


def tiny_config(**overrides) -> EncoderConfig:
    return EncoderConfig(**{"depths": (1, 1, 2, 1), "dims": (8, 16, 16, 24), **overrides})


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Every parameter away from its initial value: GRN switched on, no zero biases, no symmetric kernels."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (0.2 * noise + (1 if parameter.dim() == 1 and parameter.mean() == 1 else 0)).to(parameter)


def tiny_fcmae(dtype: torch.dtype = torch.float32, seed: int = 0, backend: str = "reference", **options) -> FCMAE:
    """Randomised autoencoder for images of 2 × 4 patches of 16 pixels."""
    encoder = tiny_config(**{"patch_size": 16, **options.pop("encoder", {})})
    patch = encoder.patch_size
    config = FCMAEConfig(encoder, **{"img_size": (2 * patch, 4 * patch), "decoder_dim": 12, **options})
    model = FCMAE(config, backend)
    randomise(model, seed)
    return model.to(dtype)


def images_for(visible: Tensor, patch: int = 16, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    batch, gh, gw = visible.shape
    return torch.randn(batch, channels, gh * patch, gw * patch, generator=generator, dtype=torch.float64).to(dtype)


def as_rows(x: Tensor, grid: Grid, visible: Tensor, side: int) -> Tensor:
    """The visible cells as ``[N, C]``, whatever the grid."""
    return x if isinstance(grid, SparseGrid) else MaskedDenseGrid(visible, side).gather(x)


def stages_and_gradients(encoder: nn.Module, images: Tensor, grid: Grid, visible: Tensor) -> dict[str, Tensor]:
    """Visible features of every stage, and the gradients of a fixed random functional of all of them."""
    generator = torch.Generator().manual_seed(2)
    images = images.clone().requires_grad_()
    results, total = {}, images.new_zeros(())
    for stage, (x, below) in enumerate(encoder.forward_stages(images, grid)):
        rows = as_rows(x, below, visible, 8 >> stage)
        results[f"stage {stage}"] = rows
        cotangent = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
        total = total + (rows * cotangent).sum()
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, [images, *parameters])
    return results | dict(zip(("images", *names), gradients, strict=True))


def largest_relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The worst tensor's largest error over its largest value; infinite where something is not finite."""
    worst = 0.0
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        if value.numel():
            error = (found[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-300)
            worst = max(worst, error.item() if error.isfinite() else float("inf"))
    return worst


def check_rule(found: dict[str, Tensor], plain: dict[str, Tensor], oracle: dict[str, Tensor]) -> None:
    """Worst relative error against float64 at most twice that of plain torch, plus 4 eps.

    Over all tensors, not one by one: through a whole network the rounding of a single tensor is a matter of luck, in
    either implementation.
    """
    error, plain_error = largest_relative_error(found, oracle), largest_relative_error(plain, oracle)
    floor = 4 * torch.finfo(next(iter(found.values())).dtype).eps
    assert error <= 2 * plain_error + floor, f"{error:.3g} > 2 × {plain_error:.3g} + {floor:.3g}"


def official_loss(images: Tensor, pred: Tensor, mask: Tensor, patch: int, norm_pix: bool = True) -> Tensor:
    """The loss as the paper's code defines it: all patches predicted, then a mean over the masked ones."""
    batch, channels, height, width = images.shape
    h, w = height // patch, width // patch
    target = images.reshape(batch, channels, h, patch, w, patch)
    target = torch.einsum("nchpwq->nhwpqc", target).reshape(batch, h * w, patch * patch * channels)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    error = torch.einsum("ncl->nlc", pred.flatten(2)) - target
    per_patch = (error**2).mean(-1)
    return (per_patch * mask).sum() / mask.sum()


def parameter_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=False), strict=True))

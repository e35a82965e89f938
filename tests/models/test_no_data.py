"""The loss where pixels have no data, against a loop over patches in numpy."""

import numpy as np
import pytest
import torch

from convnextv2.models.fcmae import TARGET_EPS, create_fcmae
from convnextv2.models.no_data import parted

PATCH, CHANNELS = 16, 3


def network(tiny_encoder, norm: bool):
    torch.manual_seed(0)
    return create_fcmae(tiny_encoder, img_size=64, decoder_dim=16, norm_pix_loss=norm)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, CHANNELS, 64, 64, generator=generator) * 2 + 1
    images[torch.rand(images.shape, generator=generator) < 0.2] = torch.nan
    images[0, :, :16, :16] = torch.nan  # a patch without data
    images[1, :, 16:32, :16] = torch.nan
    images[1, 0, 20, 3] = 5.0  # and one with a single value
    mask = torch.zeros(2, 16)
    mask[:, :9] = 1
    return *parted(images), mask


def by_hand(pred: torch.Tensor, images: torch.Tensor, valid: torch.Tensor, mask: torch.Tensor, norm: bool) -> float:
    losses = []
    for image in range(2):
        for number in np.flatnonzero(mask[image]):
            row, column = divmod(int(number), 4)
            part = (
                image,
                slice(None),
                slice(PATCH * row, PATCH * row + PATCH),
                slice(PATCH * column, PATCH * column + PATCH),
            )
            values, there = images[part].double().numpy(), valid[part].numpy()
            if not there.any():
                continue
            if norm:
                known = values[there]
                variance = known.var(ddof=1) if len(known) > 1 else 0.0
                values = (values - known.mean()) / np.sqrt(variance + TARGET_EPS)
            said = pred[image, :, row, column].double().numpy().reshape(PATCH, PATCH, CHANNELS).transpose(2, 0, 1)
            losses.append(np.square(said - values)[there].mean())
    return float(np.mean(losses))


@pytest.mark.parametrize("norm", [True, False])
def test_pixels_and_patches_without_data_weigh_nothing(norm, tiny_encoder):
    model, (images, valid, mask) = network(tiny_encoder, norm), batch()
    found = model(images, mask, valid=valid)
    assert found.loss.item() == pytest.approx(by_hand(found.pred.detach(), images, valid, mask, norm), rel=1e-5)
    brief = model(images, mask, valid=valid, return_pred=False)
    assert brief.loss.item() == pytest.approx(found.loss.item(), rel=1e-5)


@pytest.mark.parametrize("norm", [True, False])
def test_where_all_is_data_it_is_the_usual_loss(norm, tiny_encoder):
    model, (images, _, mask) = network(tiny_encoder, norm), batch()
    usual = model(images, mask).loss
    assert model(images, mask, valid=torch.ones_like(images, dtype=torch.bool)).loss.item() == pytest.approx(
        usual.item(), rel=1e-5
    )


def test_without_any_data_it_is_zero_and_so_are_gradients(tiny_encoder):
    model, (images, valid, mask) = network(tiny_encoder, True), batch()
    loss = model(images, mask, valid=torch.zeros_like(valid)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_the_mean_stands_in_for_what_is_no_data():
    images, valid, _ = batch()
    assert images.isfinite().all() and (images[~valid] == 0).all() and valid.float().mean() > 0.7

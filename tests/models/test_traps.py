"""Known traps of the published code and of its re-implementations. Each check passes for ours, and fails when the trap
is put back."""

import numpy as np
import pytest
import torch
from model_helpers import UNIFORM, images_for, official_loss, randomise, tiny_config, tiny_fcmae
from torch import Tensor, nn

import convnextv2.models.fcmae as fcmae_module
import convnextv2.models.masking as masking_module
from convnextv2 import FCMAE, Encoder, create_fcmae
from convnextv2.models.layers import DropPath
from sparse_ops import ActiveSet, DenseGrid, SparseGrid
from sparse_ops.oracle import MaskedDenseGrid

MASK = (~UNIFORM).flatten(1).float()


def features(model: FCMAE, images: Tensor, mask: Tensor = MASK) -> Tensor:
    return model.encode(images, ActiveSet.from_mask(mask, (2, 4)))[0]


def check_images_do_not_see_each_other(model: FCMAE) -> None:
    images = images_for(UNIFORM)
    changed = torch.cat((images[:1], 3 * images[1:] + 1))
    first = int((MASK[0] == 0).sum())
    assert torch.equal(features(model, images)[:first], features(model, changed)[:first])


def test_grn_norm_over_the_batch():
    assert create_fcmae(tiny_config(), img_size=64).config.grn_scope == "image"
    check_images_do_not_see_each_other(tiny_fcmae())
    with pytest.raises(AssertionError):
        check_images_do_not_see_each_other(tiny_fcmae(grn_scope="batch"))


def check_initial_weights(model: FCMAE) -> None:
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            seen.add(type(module))
            count = module.weight.numel()
            assert abs(module.weight.std().item() - 0.02) < 0.02 * 5 / count**0.5, name
            assert module.weight.abs().max() < 0.2, name
            assert module.bias.eq(0).all(), name
    assert seen == {nn.Conv2d, nn.Linear}
    assert abs(model.mask_token.std().item() - 0.02) < 0.003


def test_initial_weights_of_std_one(monkeypatch):
    torch.manual_seed(0)
    model = create_fcmae(tiny_config(), img_size=64)
    check_initial_weights(model)
    for name in ("encoder.stages.1.0.dwconv", "encoder.downsample_layers.2.1", "decoder.0.dwconv", "proj"):
        original = model.get_submodule(name).weight.data.clone()
        nn.init.normal_(model.get_submodule(name).weight, std=1.0)
        with pytest.raises(AssertionError, match=name):
            check_initial_weights(model)
        model.get_submodule(name).weight.data = original


def check_black_patch_stays_visible(model: FCMAE) -> None:
    images = images_for(UNIFORM)
    images[0, :, :16, :16] = 0
    assert MASK[0, 0] == 0
    assert len(features(model, images)) == int((MASK == 0).sum())
    oracle = model.encoder.forward_features(images, MaskedDenseGrid(UNIFORM)).permute(0, 2, 3, 1)
    torch.testing.assert_close(features(model, images), oracle[UNIFORM], rtol=1e-4, atol=1e-4)


def test_visible_zeros_are_dropped(monkeypatch):
    model = tiny_fcmae()
    for parameter in (model.encoder.downsample_layers[0][0].bias, model.encoder.downsample_layers[0][1].bias):
        nn.init.zeros_(parameter)
    check_black_patch_stays_visible(model)

    def by_value(self: SparseGrid, layer: nn.Conv2d, images: Tensor) -> Tensor:
        rows = self.active.gather_patches(images)
        patches = rows.view(self.active.num_patches, -1).abs().sum(1) > 0
        mask = torch.ones_like(MASK).flatten()
        mask[self.active._patches.flat_P[patches]] = 0
        self.active = ActiveSet.from_mask(mask.view_as(MASK), self.active.grid_size)
        return self.active.gather_patches(images) @ layer.weight.flatten(1).t() + layer.bias

    monkeypatch.setattr(SparseGrid, "stem", by_value)
    with pytest.raises(AssertionError):
        check_black_patch_stays_visible(model)


def check_last_row_and_column_may_be_masked(model: FCMAE) -> None:
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1]]).expand(3, 2, 4).float()
    images = images_for(UNIFORM)
    loss, pred, _ = model(images, mask)
    assert pred.shape == (3, 768, 2, 4)
    torch.testing.assert_close(loss, official_loss(images, pred, mask.flatten(1), 16))


def test_map_size_from_the_largest_coordinate(monkeypatch):
    model = tiny_fcmae()
    check_last_row_and_column_may_be_masked(model)

    def inferred(self: ActiveSet, x: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        shape = (*(self.coordinates.amax(0) + 1).tolist(), x.shape[1])
        return torch.as_tensor(fill).expand(shape).index_put(tuple(self.coordinates.unbind(1)), x)

    monkeypatch.setattr(ActiveSet, "densify", inferred)
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        check_last_row_and_column_may_be_masked(model)


def check_kept_count() -> None:
    mask = masking_module.random_mask(2, 49, 0.6)
    assert (mask == 0).sum(1).tolist() == [19, 19]


def test_kept_count_rounds_to_nearest(monkeypatch):
    check_kept_count()
    monkeypatch.setattr(masking_module, "keep_count", lambda patches, ratio: round(patches * (1 - ratio)))
    with pytest.raises(AssertionError):
        check_kept_count()


def check_mask_ratio_is_obeyed() -> None:
    images = images_for(UNIFORM)
    model = tiny_fcmae(mask_ratio=0.25)
    assert model(images).mask.sum(1).tolist() == [2, 2, 2]
    assert model(images, mask_ratio=0.75).mask.sum(1).tolist() == [6, 6, 6]


def test_mask_ratio_of_the_constructor_is_ignored(monkeypatch):
    check_mask_ratio_is_obeyed()
    ours = FCMAE.forward
    monkeypatch.setattr(
        FCMAE, "forward", lambda self, images, mask=None, mask_ratio=0.6: ours(self, images, mask, mask_ratio)
    )
    with pytest.raises(AssertionError):
        check_mask_ratio_is_obeyed()


def check_targets_are_normalised(**options) -> None:
    model = create_fcmae(tiny_config(patch_size=16), img_size=(32, 64), **options)
    hidden = ActiveSet.from_mask(1 - MASK, (2, 4), side=1)
    images = 5 * images_for(UNIFORM) + 3
    target = model.targets(images, hidden)
    assert target.dtype == torch.float32
    torch.testing.assert_close(target.mean(1), torch.zeros(len(target)), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.var(1, correction=1), torch.ones(len(target)), rtol=0, atol=1e-5)
    flat = model.targets(torch.full_like(images, 0.3), hidden)
    assert flat.isfinite().all()


def test_targets_are_raw_pixels_or_of_biased_variance(monkeypatch):
    check_targets_are_normalised()
    with pytest.raises(AssertionError):
        check_targets_are_normalised(norm_pix_loss=False)
    ours = torch.nn.functional.layer_norm

    def biased(x, shape, weight=None, bias=None, eps=1e-5):
        return ours(x, shape, weight if bias is not None else None, bias, eps)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", biased)
    with pytest.raises(AssertionError):
        check_targets_are_normalised()


def check_mask_token_follows_the_projection(model: FCMAE) -> None:
    entering: list[Tensor] = []
    handle = model.decoder[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    images = images_for(UNIFORM)
    model(images, MASK)
    handle.remove()
    entered = entering[0]  # by a backend that fuses: cells, else a dense map
    rows = (entered if entered.dim() == 2 else entered.permute(0, 2, 3, 1)).reshape(3 * 8, -1)
    visible = UNIFORM.flatten()
    assert torch.equal(rows[~visible], model.mask_token.flatten().expand(int((~visible).sum()), -1))
    expected = features(model, images) @ model.proj.weight.flatten(1).t() + model.proj.bias
    torch.testing.assert_close(rows[visible], expected)


def test_mask_token_before_the_projection(monkeypatch):
    model = tiny_fcmae()
    check_mask_token_follows_the_projection(model)
    ours = ActiveSet.densify

    def project_everything(self: ActiveSet, x: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        return ours(self, x, model.proj.bias + model.mask_token.flatten())

    monkeypatch.setattr(ActiveSet, "densify", project_everything)
    with pytest.raises(AssertionError):
        check_mask_token_follows_the_projection(model)


def check_rectangles_and_channels() -> None:
    for patch, channels in ((16, 5), (8, 1), (32, 4)):
        model = tiny_fcmae(encoder={"patch_size": patch, "in_chans": channels}, norm_pix_loss=False)
        images = images_for(UNIFORM, patch, channels)
        pred = torch.einsum("nchpwq->npqchw", images.reshape(3, channels, 2, patch, 4, patch)).flatten(1, 3)
        assert torch.equal(model.reconstruct(images, pred), images)
        assert model(images, MASK).pred.shape == pred.shape


def test_three_channels_and_squares_only(monkeypatch):
    check_rectangles_and_channels()
    ours = fcmae_module.unpatchify
    for trap in (
        lambda patches, grid_size, channels: ours(patches, (4, 2), channels),
        lambda patches, grid_size, channels: ours(patches, grid_size, 3),
    ):
        monkeypatch.setattr(fcmae_module, "unpatchify", trap)
        with pytest.raises((AssertionError, RuntimeError)):
            check_rectangles_and_channels()


def check_loss_is_over_masked_patches_in_float32(model: FCMAE) -> None:
    images = images_for(UNIFORM)
    with torch.autocast("cpu", torch.bfloat16):
        loss, pred, mask = model(images, MASK)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, official_loss(images, pred.float(), mask, 16), rtol=1e-5, atol=0)


def test_loss_over_every_patch_or_in_low_precision(monkeypatch):
    model = tiny_fcmae()
    check_loss_is_over_masked_patches_in_float32(model)
    with monkeypatch.context() as context:
        low = staticmethod(lambda pred, target: (pred.bfloat16() - target.bfloat16()).square().mean())
        context.setattr(FCMAE, "loss", low)
        with pytest.raises(AssertionError):
            check_loss_is_over_masked_patches_in_float32(model)
    everywhere = staticmethod(lambda pred, target: (pred.float() - target).square().sum() / (24 * 768))
    monkeypatch.setattr(FCMAE, "loss", everywhere)
    with pytest.raises(AssertionError):
        check_loss_is_over_masked_patches_in_float32(model)


def check_drop_path_follows_torch_per_image() -> None:
    layer = DropPath(0.5)
    x = torch.ones(64, 2, 2, 3)
    torch.manual_seed(0)
    np.random.seed(1)  # noqa: NPY002 (the global generator is the trap)
    first = layer(x, DenseGrid(64))
    torch.manual_seed(0)
    assert torch.equal(first, layer(x, DenseGrid(64)))
    per_image = first.flatten(1)
    assert torch.equal(per_image, per_image[:, :1].expand_as(per_image))
    assert set(per_image[:, 0].tolist()) == {0.0, 2.0}
    torch.manual_seed(1)
    assert not torch.equal(first, layer(x, DenseGrid(64)))


def test_drop_path_from_numpy_or_for_the_whole_batch(monkeypatch):
    check_drop_path_follows_torch_per_image()

    def from_numpy(self: DropPath, x: Tensor, grid: DenseGrid) -> Tensor:
        kept = np.random.rand(grid.batch_size, 1) >= self.rate  # noqa: NPY002
        factor = torch.from_numpy(kept).to(x) / (1 - self.rate)
        return grid.pointwise(lambda cells: grid.image_scale(cells, factor), x)

    def whole_batch(self: DropPath, x: Tensor, grid: DenseGrid) -> Tensor:
        return x * x.new_empty(1).bernoulli_(1 - self.rate) / (1 - self.rate)

    for trap in (from_numpy, whole_batch):
        monkeypatch.setattr(DropPath, "forward", trap)
        with pytest.raises(AssertionError):
            check_drop_path_follows_torch_per_image()


class MaskedOnceGrid(DenseGrid):
    """Masks after the stem and lets dense convolutions leak into masked cells from there on."""

    def stem(self, layer: nn.Conv2d, images: Tensor) -> Tensor:
        return super().stem(layer, images) * UNIFORM.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]


def test_masking_once_after_the_stem():
    encoder, images = Encoder(tiny_config(patch_size=16)), images_for(UNIFORM)
    randomise(encoder)
    sparse = encoder(images, SparseGrid(ActiveSet.from_mask(~UNIFORM), "reference"))

    def check(grid: DenseGrid) -> None:
        torch.testing.assert_close(encoder(images, grid).permute(0, 2, 3, 1)[UNIFORM], sparse, rtol=1e-4, atol=1e-4)

    check(MaskedDenseGrid(UNIFORM))
    with pytest.raises(AssertionError):
        check(MaskedOnceGrid(3))

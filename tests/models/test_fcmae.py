import copy
import pickle

import pytest
import torch
from model_helpers import (
    BACKENDS,
    RAGGED,
    UNIFORM,
    images_for,
    largest_relative_error,
    official_loss,
    parameter_gradients,
    tiny_config,
    tiny_fcmae,
)

from convnextv2 import FCMAE, create_fcmae
from convnextv2.models.fcmae import TARGET_EPS, unpatchify
from sparse_ops import BackendUnavailableError, DenseGrid, registry
from sparse_ops.oracle import MaskedDenseGrid

MASK = (~UNIFORM).flatten(1).float()
RAGGED_MASK = (~RAGGED).flatten(1).float()


def dense_masked_loss(model: FCMAE, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The whole autoencoder on dense maps, re-masked: written for the test, in the order of the paper."""
    grid = MaskedDenseGrid(visible, 8, model.config.grn_scope, images.dtype)
    features = grid.cells(model.encoder.forward_features(images, grid))
    masked = (~visible)[..., None].to(images.dtype)
    weight, bias = model.proj.weight.flatten(1), model.proj.bias
    x = (features @ weight.t() + bias) * (1 - masked) + model.mask_token.flatten() * masked
    everything = DenseGrid(len(images))
    for block in model.decoder:
        x = everything.cells(block(everything.features(x), everything))
    pred = (x @ model.pred.weight.flatten(1).t() + model.pred.bias).permute(0, 3, 1, 2)
    return official_loss(images, pred, masked.flatten(1), model.config.encoder.patch_size, model.config.norm_pix_loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("visible", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_loss_and_gradients_are_those_of_the_dense_masked_network(backend, visible, scope, monkeypatch):
    model = tiny_fcmae(torch.float64, backend=backend, grn_scope=scope, decoder_depth=2)
    images = images_for(visible, dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # so that targets and loss stay in float64
    loss = model(images, (~visible).flatten(1)).loss
    expected = dense_masked_loss(model, images, visible)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    found, oracle = parameter_gradients(model, loss), parameter_gradients(model, expected)
    assert largest_relative_error(found, oracle) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("visible", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
def test_float32_training_step_follows_the_rule(backend, visible, monkeypatch):
    # The worst of some hundred roundings is a matter of luck for a single set of weights: here are four.
    errors, plain_errors = [], []
    for draw in range(4):
        model, images = tiny_fcmae(backend=backend), images_for(visible)
        generator = torch.Generator().manual_seed(draw)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)

        def results(loss: torch.Tensor, model: FCMAE = model) -> dict[str, torch.Tensor]:
            return {"loss": loss.detach(), **parameter_gradients(model, loss)}

        found = results(model(images, (~visible).flatten(1)).loss)
        plain = results(dense_masked_loss(model, images, visible))
        oracle = results(dense_masked_loss(model.double(), images.double(), visible))
        errors.append(largest_relative_error(found, oracle))
        plain_errors.append(largest_relative_error(plain, oracle))
    assert sum(errors) <= 2 * sum(plain_errors) + 4 * 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("patch", [32, 16, 8])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_output_shapes(patch, channels):
    model = create_fcmae(tiny_config(patch_size=patch, in_chans=channels), img_size=(2 * patch, 4 * patch))
    loss, pred, mask = model(torch.randn(3, channels, 2 * patch, 4 * patch))
    assert loss.shape == ()
    assert pred.shape == (3, patch * patch * channels, 2, 4)
    assert mask.shape == (3, 8)
    assert mask.sum(1).tolist() == [5.0] * 3
    # Other multiples of the patch size work, too.
    assert model(torch.randn(1, channels, 3 * patch, patch)).pred.shape == (1, patch * patch * channels, 3, 1)


def test_output_shapes_at_224():
    output = create_fcmae("convnextv2_atto", backend="reference")(torch.randn(1, 3, 224, 224))
    assert output.loss.shape == ()
    assert output.pred.shape == (1, 3072, 7, 7)
    assert output.mask.shape == (1, 49)
    assert output.mask.sum() == 30


@pytest.mark.parametrize("mask", [MASK, RAGGED_MASK], ids=["uniform", "ragged"])
@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_loss_is_the_official_formula(mask, norm_pix, channels):
    model = tiny_fcmae(norm_pix_loss=norm_pix, encoder={"in_chans": channels})
    images = images_for(UNIFORM, channels=channels)
    loss, pred, _ = model(images, mask)
    torch.testing.assert_close(loss, official_loss(images, pred, mask, 16, norm_pix))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [MASK, RAGGED_MASK], ids=["uniform", "ragged"])
def test_loss_alone_has_the_same_value_and_gradients(backend, mask):
    model, images = tiny_fcmae(torch.float64, backend=backend), images_for(UNIFORM, dtype=torch.float64)
    full, alone = model(images, mask), model(images, mask, return_pred=False)
    assert alone.pred is None
    torch.testing.assert_close(alone.loss, full.loss, rtol=1e-12, atol=0)
    found, expected = parameter_gradients(model, alone.loss), parameter_gradients(model, full.loss)
    assert largest_relative_error(found, expected) < 1e-11


def test_drawn_mask_gives_what_the_same_mask_gives_when_named():
    model, images = tiny_fcmae(), images_for(UNIFORM)
    drawn = model(images, generator=torch.Generator().manual_seed(0))
    named = model(images, drawn.mask)
    torch.testing.assert_close(named.loss, drawn.loss)
    torch.testing.assert_close(named.pred, drawn.pred)
    again = model(images, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.mask, drawn.mask)
    assert torch.equal(again.loss, drawn.loss)


def test_mask_forms_agree():
    model, images = tiny_fcmae(), images_for(UNIFORM)
    expected = model(images, MASK)
    for form in (~UNIFORM, (~UNIFORM).long(), MASK.double(), MASK.to(torch.uint8)):
        output = model(images, form)
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.mask, MASK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.zeros(3, 7)}, r"expected a mask \[3, 8\] for a patch grid of 2×4, got \(3, 7\)"),
        ({"mask": torch.zeros(2, 8)}, r"expected a mask \[3, 8\]"),
        ({"mask": torch.zeros(3, 4, 2)}, r"expected a mask \[3, 8\]"),
        ({"mask": torch.full((3, 8), 0.5)}, "1 \\(masked\\) and 0 \\(visible\\) only"),
        ({"mask": torch.full((3, 8), float("nan"))}, "1 \\(masked\\) and 0 \\(visible\\) only"),
        ({"mask": MASK * 2}, "1 \\(masked\\) and 0 \\(visible\\) only"),
        ({"mask": MASK, "mask_ratio": 0.5}, "a mask or a mask_ratio, not both"),
        ({"mask_ratio": 0.0}, "choose a ratio"),
        ({"mask_ratio": 1.0}, "choose a ratio"),
        ({"mask_ratio": 2.0}, "choose a ratio"),
        ({"mask_ratio": float("nan")}, "choose a ratio"),
    ],
)
def test_wrong_masks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_fcmae()(images_for(UNIFORM), **options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 32, 64), "expected images"),
        ((1, 1, 32, 64), "expected images"),
        ((1, 3, 30, 64), "not divisible by the patch size 16"),
        ((1, 3, 16, 16), "image of 1 patch cannot be masked"),
    ],
)
def test_wrong_images_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_fcmae()(torch.zeros(shape))


@pytest.mark.parametrize("ratio", [0.0, 1.0, 2.0, float("nan")])
def test_factory_refuses_ratios_early(ratio):
    with pytest.raises(ValueError, match="choose a ratio"):
        create_fcmae(tiny_config(), img_size=64, mask_ratio=ratio)


def test_factory_refuses_sizes_names_and_backends_early():
    with pytest.raises(ValueError, match="not divisible by the patch size 32"):
        create_fcmae("convnextv2_atto", img_size=100)
    with pytest.raises(ValueError, match="unknown model"):
        create_fcmae("resnet50")
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        create_fcmae("convnextv2_atto", backend="tpu")


def test_factory_raises_for_unavailable_backends(monkeypatch):
    from sparse_ops import get_backend

    monkeypatch.setattr(type(get_backend("reference")), "unavailable_reason", lambda self: "out of order")
    with pytest.raises(BackendUnavailableError, match="out of order"):
        create_fcmae("convnextv2_atto", backend="reference")


@pytest.mark.parametrize("return_pred", [True, False])
def test_nothing_masked_has_loss_zero(return_pred):
    model, images = tiny_fcmae(), images_for(UNIFORM)
    loss = model(images, torch.zeros(3, 8), return_pred=return_pred).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("return_pred", [True, False])
def test_an_image_without_visible_patches_is_finite(backend, return_pred):
    assert RAGGED_MASK[1].all()
    model = tiny_fcmae(backend=backend)
    loss = model(images_for(RAGGED), RAGGED_MASK, return_pred=return_pred).loss
    gradients = parameter_gradients(model, loss)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["encoder.stages.0.0.dwconv.weight"].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_masked_is_finite(backend):
    model = tiny_fcmae(backend=backend)
    loss = model(images_for(UNIFORM), torch.ones(3, 8)).loss
    loss.backward()
    assert loss.isfinite()
    assert model.mask_token.grad.abs().max() > 0
    for parameter in model.encoder.parameters():
        assert parameter.grad is None or parameter.grad.eq(0).all()


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_reconstruction_of_a_perfect_prediction_is_the_image(norm_pix, channels):
    model = tiny_fcmae(norm_pix_loss=norm_pix, encoder={"in_chans": channels})
    images = images_for(UNIFORM, channels=channels) * 3 + 1
    patches = images.reshape(3, channels, 2, 16, 4, 16)
    target = torch.einsum("nchpwq->nhwpqc", patches).reshape(3, 8, -1)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + TARGET_EPS).sqrt()
    pred = target.transpose(1, 2).reshape(3, -1, 2, 4)
    torch.testing.assert_close(model.reconstruct(images, pred), images)
    assert official_loss(images, pred, MASK, 16, norm_pix) < 1e-10


def test_unpatchify_is_the_inverse_of_patchify():
    images = images_for(UNIFORM)
    patches = torch.einsum("nchpwq->nhwpqc", images.reshape(3, 3, 2, 16, 4, 16)).reshape(3, 8, -1)
    assert torch.equal(unpatchify(patches, (2, 4), 3), images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_trains_near_float32(backend):
    model, images = tiny_fcmae(backend=backend), images_for(UNIFORM)
    expected = model(images, MASK, return_pred=False).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, MASK, return_pred=False).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert loss.item() == pytest.approx(expected.item(), rel=0.03)
    assert loss.item() != expected.item()


@pytest.mark.parametrize(
    "backend", [b for b in BACKENDS if registry()[b].rejects(torch.device("cpu"), torch.bfloat16, 7) is None]
)
def test_bfloat16_parameters_train(backend):
    model, images = tiny_fcmae(torch.bfloat16, backend=backend), images_for(UNIFORM)
    expected = tiny_fcmae(backend=backend)(images, MASK).loss
    loss = model(images.bfloat16(), MASK).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)


def test_copies_and_pickles_compute_the_same():
    model, images = tiny_fcmae(), images_for(UNIFORM)
    expected = model(images, MASK).loss
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(images, MASK).loss, expected)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = create_fcmae(tiny_config(patch_size=8), img_size=32, decoder_dim=16)
    images = torch.randn(4, 3, 1, 1).expand(4, 3, 32, 32) + torch.linspace(-1, 1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(images, return_pred=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("return_pred", [True, False])
def test_compiled_it_computes_the_same(return_pred):
    model, images = tiny_fcmae(backend="auto"), images_for(UNIFORM)
    names = list(model.state_dict())
    results = []
    torch._dynamo.reset()
    for compiled in (False, True):
        if compiled:
            model.compile(backend="aot_eager")
        generator = torch.Generator().manual_seed(3)
        loss, pred, mask = model(images, generator=generator, return_pred=return_pred)
        results.append({"loss": loss.detach(), "mask": mask, **parameter_gradients(model, loss)})
        assert (pred is not None) == return_pred
    assert largest_relative_error(results[1], results[0]) < 1e-5
    assert list(model.state_dict()) == names
    assert copy.deepcopy(model)._compiled is None
    with torch.compiler.set_stance("fail_on_recompile"):
        model(images, return_pred=return_pred)
    given = model(images, mask, return_pred=return_pred)
    ragged = mask.clone()
    ragged[0] = torch.arange(mask.shape[1]) == 0
    assert given.loss.detach() == pytest.approx(float(loss.detach()), rel=1e-5)
    assert model(images, ragged).loss.isfinite()

import copy
import os
import pickle

import pytest
import torch
from model_helpers import (
    BACKENDS,
    RAGGED,
    UNIFORM,
    check_rule,
    images_for,
    largest_relative_error,
    randomise,
    stages_and_gradients,
    tiny_config,
)

from convnextv2 import Block, Encoder
from sparse_ops import ActiveSet, DenseGrid, SparseGrid, get_backend
from sparse_ops.conformance_cases import in_layout
from sparse_ops.oracle import MaskedDenseGrid

EVERYTHING = torch.ones_like(UNIFORM)


def tiny_encoder(dtype=torch.float64, **options) -> Encoder:
    encoder = Encoder(tiny_config(**{"patch_size": 16, **options}))
    randomise(encoder)
    return encoder.to(dtype)


def sparse_grid(visible, backend="reference", scope="image"):
    return SparseGrid(ActiveSet.from_mask(~visible), backend, scope)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patch", [8, 16, 32])
def test_nothing_masked_is_the_dense_network(backend, patch):
    encoder, images = tiny_encoder(patch_size=patch), images_for(EVERYTHING, patch, dtype=torch.float64)
    dense = stages_and_gradients(encoder, images, DenseGrid(3), EVERYTHING)
    sparse = stages_and_gradients(encoder, images, sparse_grid(EVERYTHING, backend), EVERYTHING)
    assert largest_relative_error(sparse, dense) < 1e-11

    encoder.float()
    dense32 = stages_and_gradients(encoder, images.float(), DenseGrid(3), EVERYTHING)
    sparse32 = stages_and_gradients(encoder, images.float(), sparse_grid(EVERYTHING, backend), EVERYTHING)
    encoder.double()
    oracle = stages_and_gradients(encoder, images.float().double(), DenseGrid(3), EVERYTHING)
    check_rule(sparse32, dense32, oracle)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("visible", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
@pytest.mark.parametrize("patch", [8, 16, 32])
def test_masked_is_the_masked_dense_network_at_every_stage(backend, scope, visible, patch):
    encoder, images = tiny_encoder(patch_size=patch), images_for(visible, patch, dtype=torch.float64)
    dense_grid = MaskedDenseGrid(visible, 8, scope, torch.float64)
    oracle = stages_and_gradients(encoder, images, dense_grid, visible)
    sparse = stages_and_gradients(encoder, images, sparse_grid(visible, backend, scope), visible)
    assert largest_relative_error(sparse, oracle) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("visible", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
def test_masked_float32_follows_the_rule(backend, visible):
    encoder, images = tiny_encoder(torch.float32), images_for(visible)
    plain = stages_and_gradients(encoder, images, MaskedDenseGrid(visible), visible)
    sparse = stages_and_gradients(encoder, images, sparse_grid(visible, backend), visible)
    encoder.double()
    dense_grid = MaskedDenseGrid(visible, dtype=torch.float64)
    check_rule(sparse, plain, stages_and_gradients(encoder, images.double(), dense_grid, visible))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_other_kernel_sizes(backend, kernel_size):
    encoder, images = tiny_encoder(kernel_size=kernel_size), images_for(RAGGED, dtype=torch.float64)
    oracle = stages_and_gradients(encoder, images, MaskedDenseGrid(RAGGED, dtype=torch.float64), RAGGED)
    sparse = stages_and_gradients(encoder, images, sparse_grid(RAGGED, backend), RAGGED)
    assert largest_relative_error(sparse, oracle) < 1e-11


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_pixels_do_not_reach_the_features(backend, garbage):
    encoder, images = tiny_encoder(torch.float32), images_for(RAGGED)
    hidden = (~RAGGED).repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    clean = encoder(images, sparse_grid(RAGGED, backend))
    spoilt = encoder(images.masked_fill(hidden, garbage), sparse_grid(RAGGED, backend))
    if backend == "minkowski" and os.environ.get("OMP_NUM_THREADS") != "1":
        torch.testing.assert_close(spoilt, clean)  # on several threads MinkowskiEngine does not repeat its last bits
    else:
        assert torch.equal(spoilt, clean)
    assert not torch.equal(encoder(images.masked_fill(~hidden, 0.5), sparse_grid(RAGGED, backend)), clean)


def test_dense_features_and_stage_shapes():
    encoder = tiny_encoder(torch.float32, in_chans=5)
    images = images_for(UNIFORM, channels=5)
    shapes = [tuple(x.shape) for x, _ in encoder.forward_stages(images, DenseGrid(3))]
    assert shapes == [(3, 8, 16, 32), (3, 16, 8, 16), (3, 16, 4, 8), (3, 24, 2, 4)]
    assert torch.equal(encoder.forward_features(images), encoder(images))


@pytest.mark.parametrize("shape", [(2, 3, 8, 64), (2, 4, 32, 64), (3, 32, 64), (2, 3, 32, 15)])
def test_wrong_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected images \[B, 3, H, W\]|smaller than the patch size 16"):
        tiny_encoder(torch.float32)(torch.zeros(shape))


def test_drop_path_rates_grow_linearly():
    encoder = tiny_encoder(drop_path_rate=0.4)
    rates = [block.drop_path.rate for block in encoder.modules() if isinstance(block, Block)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_keeps_the_expectation_and_stops_in_eval():
    block = Block(4, drop_path=0.25).double()
    randomise(block)
    x = torch.randn(4000, 4, 1, 1, dtype=torch.float64)
    grid = DenseGrid(4000)
    full = block.eval()(x, grid) - x
    torch.manual_seed(0)
    dropped = block.train()(x, grid) - x
    kept = dropped.flatten(1).abs().sum(1) > 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(dropped[kept], full[kept] / 0.75)


@pytest.mark.parametrize("backend", BACKENDS)
def test_drop_path_on_a_sparse_grid_drops_whole_images(backend):
    block = Block(8, drop_path=0.5)
    randomise(block)
    grid = sparse_grid(RAGGED, backend)
    x = torch.randn(grid.active.num_cells, 8)
    torch.manual_seed(0)
    seen = set()
    for _ in range(12):
        changed = (block(x, grid) - x).abs().sum(1) > 0
        per_image = [part for part in changed.split(list(grid.active.cell_counts)) if len(part)]
        assert all(bool(part.all()) or not bool(part.any()) for part in per_image)
        seen.add(tuple(bool(part[0]) for part in per_image))
    assert len(seen) > 2
    assert "rate=0.500" in repr(block)


def test_runs_are_bit_identical():
    encoder, images = tiny_encoder(torch.float32), images_for(RAGGED)
    first, second = (stages_and_gradients(encoder, images, sparse_grid(RAGGED, "auto"), RAGGED) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_copies_and_pickles_compute_the_same():
    encoder, images = tiny_encoder(torch.float32), images_for(RAGGED)
    expected = encoder(images, sparse_grid(RAGGED))
    for clone in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(clone(images, sparse_grid(RAGGED)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "minkowski"])
def test_the_encoder_compiles_without_a_graph_break(backend):
    """From the mask on: the active set and its tables are part of the graph."""
    encoder, images = tiny_encoder(torch.float32, kernel_size=3), images_for(UNIFORM)
    mask, kernels = (~UNIFORM).flatten(1), get_backend(backend)

    def loss(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        active = ActiveSet.from_mask(mask, (2, 4), keep=4)
        return encoder(images, SparseGrid(active, kernels)).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        encoder.zero_grad()
        value = function(images, mask)
        value.backward()
        results.append({"loss": value.detach(), **{n: p.grad.clone() for n, p in encoder.named_parameters()}})
    assert largest_relative_error(results[1], results[0]) < 1e-5
    other = (~UNIFORM).flip(0).flatten(1)  # another mask needs no other graph
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.allclose(compiled(images, other), loss(images, other), rtol=1e-5)


@pytest.mark.slow
def test_compiled_block_computes_the_same():
    block, grid = Block(8, kernel_size=3), sparse_grid(RAGGED, "auto")
    randomise(block)
    x = torch.randn(grid.active.num_cells, 8)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager")
    names, parameters = zip(*block.named_parameters(), strict=True)
    found, expected = (
        dict(zip(("output", *names), (out, *torch.autograd.grad(out.square().sum(), parameters)), strict=True))
        for out in (compiled(x, grid), block(x, grid))
    )
    assert largest_relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("backend", [*BACKENDS, "dense"])
@pytest.mark.parametrize("layout", ["transposed", "strided", "channels last"])
def test_memory_layout_of_images_and_weights_does_not_matter(backend, layout):
    encoder = tiny_encoder(torch.float64)
    images = images_for(UNIFORM, dtype=torch.float64)
    grid = DenseGrid(3) if backend == "dense" else sparse_grid(UNIFORM, backend)
    expected = encoder(images, grid)
    for parameter in encoder.parameters():
        parameter.data = in_layout(parameter.data, layout)
    torch.testing.assert_close(encoder(in_layout(images, layout), grid), expected)

"""The sparse grid against the re-masked dense one, operation by operation, and argument checks."""

import pytest
import torch
from torch import nn

from sparse_ops import ActiveSet, DenseGrid, SparseGrid, depthwise_conv, get_backend
from sparse_ops.oracle import MaskedDenseGrid, visible_from_text
from sparse_ops.pointwise import grn_scale

RAGGED = visible_from_text("..#/#.#", "###/###", ".../..#")
UNIFORM = visible_from_text("..#/#.#", "#.#/..#")


def both(visible, side=4, scope="image", dtype=torch.float64):
    active = ActiveSet.from_mask(~visible, side=side)
    return SparseGrid(active, "reference", scope), MaskedDenseGrid(visible, side, scope, dtype)


def rows_and_map(visible, side, channels, dtype=torch.float64):
    """Random rows on a map whose masked cells hold garbage."""
    active = ActiveSet.from_mask(~visible, side=side)
    x = torch.randn(active.num_cells, channels, dtype=dtype)
    return x, active.densify(x, fill=torch.full((channels,), 1e3, dtype=dtype))


@pytest.mark.parametrize("visible", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
def test_depthwise_and_downsample_match_the_masked_dense_grid(visible):
    sparse, dense = both(visible)
    x, full = rows_and_map(visible, 4, 6)
    full = dense.features(full)
    depthwise = nn.Conv2d(6, 6, 7, padding=3, groups=6).double()
    torch.testing.assert_close(sparse.depthwise(depthwise, x), dense.gather(dense.depthwise(depthwise, full)))
    strided = nn.Conv2d(6, 9, 2, stride=2).double()
    below, below_dense = sparse.down(), dense.down()
    torch.testing.assert_close(sparse.downsample(strided, x), below_dense.gather(dense.downsample(strided, full)))
    assert below.active.side == below_dense.side == 2
    assert below.backend is sparse.backend


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("visible", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
def test_grn_matches_the_formula(visible, scope):
    sparse, dense = both(visible, scope=scope)
    x, full = rows_and_map(visible, 4, 6)
    gamma, beta = torch.randn(6).double(), torch.randn(6).double()
    out = sparse.grn(x, gamma, beta, 1e-6)
    torch.testing.assert_close(out, dense.gather(dense.features(dense.grn(full, gamma, beta, 1e-6))))
    start = 0
    for count in sparse.active.cell_counts:
        rows = x[start : start + count]
        norm = torch.linalg.vector_norm(x if scope == "batch" else rows, dim=0)
        expected = gamma * (rows * (norm / (norm.mean() + 1e-6))) + beta + rows
        torch.testing.assert_close(out[start : start + count], expected)
        start += count
    assert start == len(x)


@pytest.mark.parametrize("visible", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
def test_sums_and_scales_go_by_image(visible):
    sparse, dense = both(visible)
    x, full = rows_and_map(visible, 4, 5)
    expected = torch.stack([part.sum(0) for part in x.split(list(sparse.active.cell_counts))])
    torch.testing.assert_close(sparse.image_sum(x), expected)
    torch.testing.assert_close(dense.image_sum(full), expected)
    factor = torch.arange(1.0, visible.shape[0] + 1).double()[:, None]
    torch.testing.assert_close(sparse.image_scale(x, factor), x * factor[sparse.active.image_index])
    scaled = dense.gather(dense.features(dense.image_scale(full, factor)))
    torch.testing.assert_close(scaled, sparse.image_scale(x, factor))


def test_masked_dense_sum_does_not_round_under_autocast():
    _, dense = both(UNIFORM, dtype=torch.float32)
    x = torch.randn(2, 8, 12, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dense.image_sum(x), dense.image_sum(x.clone()))
        assert dense.image_sum(x).dtype == torch.float32
        torch.testing.assert_close(dense.image_sum(x), (x * dense.mask).sum((1, 2)))


def test_grn_norm_of_bfloat16_is_taken_in_float32():
    active = ActiveSet.full(1, (1, 1), side=32)
    grid = SparseGrid(active, "reference")
    x = torch.ones(1024, 2, dtype=torch.bfloat16)
    gamma, beta = torch.tensor([1.0, 0.0]).bfloat16(), torch.zeros(2).bfloat16()
    x[:, 1] = 0.5
    out = grid.grn(x, gamma, beta, 1e-6)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out[0, 0].item(), 1 + 32 / 24, rtol=1e-2, atol=0)


def test_dead_channel_has_gradient_zero():
    """The norm of a channel that is zero everywhere has no derivative; ours is 0, not NaN."""
    for grid, x in (
        (SparseGrid(ActiveSet.full(2, (1, 1), 2), "reference"), torch.randn(8, 3)),
        (DenseGrid(2), torch.randn(2, 2, 2, 3)),
    ):
        x[..., 1] = 0
        x.requires_grad_()
        gamma = torch.ones(3, requires_grad=True)
        grid.grn(x, gamma, torch.zeros(3), 1e-6).sum().backward()
        assert x.grad.isfinite().all()
        assert torch.equal(x.grad[..., 1], torch.ones_like(x.grad[..., 1]))
        assert gamma.grad.isfinite().all()
    assert torch.equal(grn_scale(torch.zeros(1, 3), torch.ones(3), 1e-6), torch.ones(1, 3))


def test_masked_dense_grid_needs_its_mask():
    """Without the mask the same operations differ: the comparison can fail."""
    sparse, _ = both(UNIFORM)
    x, full = rows_and_map(UNIFORM, 4, 6)
    layer, grid = nn.Conv2d(6, 6, 7, padding=3, groups=6).double(), DenseGrid(2)
    plain = sparse.active.gather(grid.cells(grid.depthwise(layer, grid.features(full))))
    assert (plain - sparse.depthwise(layer, x)).abs().max() > 1
    assert (DenseGrid(2).image_sum(full) - sparse.image_sum(x)).abs().max() > 1


def test_unknown_grn_scope_is_refused():
    with pytest.raises(ValueError, match="grn_scope"):
        DenseGrid(2, "rows")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(47, 3)}, ValueError, "expected features"),
        ({"weight": torch.zeros(3, 3, 7, 7)}, ValueError, "depthwise weight"),
        ({"weight": torch.zeros(3, 1, 7, 5)}, ValueError, "depthwise weight"),
        ({"weight": torch.zeros(4, 1, 7, 7)}, ValueError, "depthwise weight"),
        ({"weight": torch.zeros(3, 1, 4, 4)}, ValueError, "odd"),
        ({"bias": torch.zeros(4)}, ValueError, r"expected a bias \[3\]"),
        ({"weight": torch.zeros(3, 1, 7, 7, dtype=torch.float64)}, TypeError, "cast"),
        ({"bias": torch.zeros(3, dtype=torch.float16)}, TypeError, "cast"),
        ({"weight": torch.zeros(3, 1, 7, 7, device="meta")}, ValueError, "weight is on meta"),
    ],
)
def test_depthwise_arguments_are_checked(change, error, message):
    arguments = {"x": torch.zeros(48, 3), "weight": torch.zeros(3, 1, 7, 7), "bias": torch.zeros(3), **change}
    active = ActiveSet.from_mask(~visible_from_text("..#/#.#"), side=4)
    with pytest.raises(error, match=message):
        depthwise_conv(**arguments, active=active, backend=get_backend("reference"))


def test_depthwise_refuses_what_the_backend_rejects_and_other_devices():
    active = ActiveSet.full(1, (1, 1), 1)
    whole = torch.ones(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"does not serve this input.*int64"):
        depthwise_conv(whole, whole.view(2, 1, 1, 1), None, active, get_backend("reference"))
    meta = torch.ones(1, 2, device="meta")
    with pytest.raises(ValueError, match="x is on meta but the active set is on cpu"):
        depthwise_conv(meta, meta.view(2, 1, 1, 1), None, active, get_backend("reference"))


def test_depthwise_follows_autocast():
    active = ActiveSet.full(1, (1, 1), 4)
    x = torch.randn(16, 3, requires_grad=True)
    weight = torch.randn(3, 1, 7, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = depthwise_conv(x, weight, torch.zeros(3), active, get_backend("reference"))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32

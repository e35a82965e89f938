import pytest
import torch
import torch.nn.functional as F

from sparse_ops import ActiveSet, morton_coordinates
from sparse_ops.active_set import reach
from sparse_ops.conformance_cases import random_case
from sparse_ops.oracle import cell_coordinates, visible_from_text

RAGGED = visible_from_text("..#/#.#", "###/###", ".../..#")
UNIFORM = visible_from_text("..#/#.#", "#.#/..#")


def active_of(visible: torch.Tensor, side: int) -> ActiveSet:
    return ActiveSet.from_mask((~visible).float(), side=side)


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_z_order_visits_each_cell_once_in_aligned_squares(side):
    cells = morton_coordinates(side)
    assert sorted(cells) == [(y, x) for y in range(side) for x in range(side)]
    square = 1
    while square <= side:
        for start in range(0, side * side, square * square):
            run = cells[start : start + square * square]
            (top, left) = run[0]
            assert top % square == left % square == 0
            assert set(run) == {(top + dy, left + dx) for dy in range(square) for dx in range(square)}
        square *= 2
    if side > 1:
        assert cells[:4] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("side", [0, -1, 3, 6, 128])
def test_z_order_refuses_other_sides(side):
    with pytest.raises(ValueError, match="power of two"):
        morton_coordinates(side)


@pytest.mark.parametrize("side", [1, 2, 4, 8])
@pytest.mark.parametrize("visible", [RAGGED, UNIFORM], ids=["ragged", "uniform"])
def test_coordinates_are_those_of_plain_loops(visible, side):
    active = active_of(visible, side)
    expected = torch.tensor(cell_coordinates(visible, side))
    assert torch.equal(active.coordinates, expected)
    assert torch.equal(active.image_index, expected[:, 0])
    assert active.num_cells == len(expected)
    assert active.map_size == (2 * side, 3 * side)


def test_sizes_of_a_ragged_set():
    active = active_of(RAGGED, 4)
    assert active.batch_size == 3
    assert active.num_patches == 8
    assert active.cell_counts == (48, 0, 80)
    assert active.uniform_count is None
    assert active.row_offsets.tolist() == [0, 48, 48, 128]
    assert active.row_offsets.dtype == torch.int64
    assert "visible=(3, 0, 5)" in repr(active)


def test_sizes_of_a_uniform_set():
    active = active_of(UNIFORM, 2)
    assert active.uniform_count == 12
    assert active.patch_coordinates.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]]


def test_nothing_visible():
    active = active_of(torch.zeros(2, 2, 2, dtype=torch.bool), 8)
    assert active.num_cells == 0
    assert active.uniform_count == 0
    assert active.coordinates.shape == (0, 3)
    assert active.densify(torch.zeros(0, 3), fill=7.0).eq(7).all()
    assert active.gather_patches(torch.zeros(2, 3, 64, 64)).shape == (0, 48)
    assert active.cell_neighbours(7).shape == (0, 49)


def test_promised_count_gives_the_same_set():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(3, 12, generator=generator)
        mask = torch.ones(3, 12).scatter_(1, noise.argsort(1)[:, :5], 0.0)
        promised = ActiveSet.from_mask(mask, (3, 4), keep=5)
        counted = ActiveSet.from_mask(mask, (3, 4))
        assert torch.equal(promised.coordinates, counted.coordinates)
        assert promised.cell_counts == counted.cell_counts


def test_mask_forms_agree():
    mask = ~RAGGED
    expected = ActiveSet.from_mask(mask, side=2).coordinates
    for form in (mask.float(), mask.long(), mask.flatten(1), mask.flatten(1).to(torch.uint8)):
        assert torch.equal(ActiveSet.from_mask(form, (2, 3), side=2).coordinates, expected)


def test_full_is_the_set_of_an_empty_mask():
    full, empty = ActiveSet.full(2, (3, 2), side=4), ActiveSet.from_mask(torch.zeros(2, 3, 2), side=4)
    assert torch.equal(full.coordinates, empty.coordinates)
    assert full.cell_counts == empty.cell_counts


def test_rows_of_single_cells_are_row_major():
    full = ActiveSet.full(2, (3, 4), side=1)
    dense = torch.arange(24.0).view(2, 3, 4, 1)
    assert torch.equal(full.gather(dense).flatten(), dense.flatten())


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (torch.zeros(2, 6), {}, "grid_size given"),
        (torch.zeros(6), {"grid_size": (2, 3)}, "must be"),
        (torch.zeros(2, 6), {"grid_size": (2, 2)}, "grid_size 2×2 has 4"),
        (torch.zeros(2, 2, 3), {"grid_size": (3, 2)}, "grid_size says"),
        (torch.zeros(2, 6), {"grid_size": (2, 3), "keep": 7}, "keep=7"),
        (torch.zeros(2, 6), {"grid_size": (2, 3), "keep": -1}, "keep=-1"),
        (torch.zeros(2, 6), {"grid_size": (2, 3), "side": 6}, "power of two"),
    ],
)
def test_wrong_masks_are_refused(mask, options, message):
    with pytest.raises(ValueError, match=message):
        ActiveSet.from_mask(mask, **options)


def test_down_halves_the_side_until_a_patch_is_a_cell():
    active = active_of(RAGGED, 8)
    for side in (4, 2, 1):
        coarse = active.down()
        assert coarse.side == side
        assert torch.equal(coarse.coordinates, torch.tensor(cell_coordinates(RAGGED, side)))
        # Four consecutive rows of the finer stage lie under one row of the coarser.
        parents = active.coordinates.view(-1, 4, 3)[:, :, 1:] // 2
        assert torch.equal(parents, coarse.coordinates[:, None, 1:].expand_as(parents))
        active = coarse
    with pytest.raises(ValueError, match="no coarser stage"):
        active.down()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_neighbour_tables_are_those_of_plain_loops(seed, kernel_size):
    case = random_case(seed)
    visible, side, half = case.visible, case.side, kernel_size // 2
    active = active_of(visible, side)

    row_of = {cell: row for row, cell in enumerate(cell_coordinates(visible, side))}
    taps = [(dy, dx) for dy in range(-half, half + 1) for dx in range(-half, half + 1)]
    cells = [[row_of.get((b, y + dy, x + dx), len(row_of)) for dy, dx in taps] for b, y, x in row_of]
    assert active.cell_neighbours(kernel_size).tolist() == cells

    patch_of = {patch: index for index, patch in enumerate(cell_coordinates(visible, 1))}
    reach = 0
    while reach * side < half:
        reach += 1
    around = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    patches = [[patch_of.get((b, y + dy, x + dx), -1) for dy, dx in around] for b, y, x in patch_of]
    table = active.patch_neighbours(kernel_size)
    assert table.tolist() == patches
    assert table.dtype == torch.int32
    assert table.is_contiguous()


@pytest.mark.parametrize("kernel_size", [0, 2, -1])
def test_neighbour_tables_refuse_even_kernels(kernel_size):
    with pytest.raises(ValueError, match="odd"):
        active_of(UNIFORM, 4).patch_neighbours(kernel_size)


@pytest.mark.parametrize("seed", range(10))
def test_densify_and_gather_are_inverse(seed):
    case = random_case(seed)
    active = active_of(case.visible, case.side)
    x = torch.randn(active.num_cells, 5)
    dense = active.densify(x, fill=torch.full((5,), 9.0))
    assert torch.equal(active.gather(dense), x)
    masked = (~case.visible).repeat_interleave(case.side, 1).repeat_interleave(case.side, 2)
    assert dense[masked].eq(9).all()
    assert dense.shape == (*masked.shape, 5)
    assert torch.equal(active.densify(x)[masked], torch.zeros(int(masked.sum()), 5))


def test_densify_passes_gradients_to_rows_and_fill():
    active = active_of(RAGGED, 2)
    x = torch.randn(active.num_cells, 3, requires_grad=True)
    fill = torch.zeros(3, requires_grad=True)
    active.densify(x, fill).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert fill.grad.tolist() == [3 * 6 * 4 - active.num_cells] * 3


def test_map_size_comes_from_the_grid():
    """The last row and column are masked in the whole batch; the map keeps them."""
    visible = visible_from_text("..#/.##/###", "#.#/..#/###")
    active = active_of(visible, 2)
    assert active.densify(torch.ones(active.num_cells, 1)).shape == (2, 6, 6, 1)


@pytest.mark.parametrize("pixels", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_stem_on_visible_patches_is_the_dense_stem(pixels, channels):
    generator = torch.Generator().manual_seed(pixels)
    images = torch.randn(3, channels, 16 * pixels, 24 * pixels, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, channels, pixels, pixels, generator=generator, dtype=torch.float64)
    active = active_of(RAGGED, 8)
    dense = F.conv2d(images, weight, stride=pixels).permute(0, 2, 3, 1)
    index = torch.tensor(cell_coordinates(RAGGED, 8)).unbind(1)
    torch.testing.assert_close(active.gather_patches(images) @ weight.flatten(1).t(), dense[index])


def test_gather_patches_takes_images_in_any_memory_format():
    images = torch.randn(3, 3, 32, 48)
    active = active_of(RAGGED, 8)
    expected = active.gather_patches(images)
    assert torch.equal(active.gather_patches(images.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(active.gather_patches(images.flip(3).flip(3)), expected)
    wide = torch.randn(3, 3, 32, 96)
    assert torch.equal(active.gather_patches(wide[..., ::2]), active.gather_patches(wide[..., ::2].contiguous()))


def test_wrong_features_and_maps_are_refused():
    active = active_of(UNIFORM, 4)
    with pytest.raises(ValueError, match=r"expected features \[96, C\]"):
        active.densify(torch.zeros(95, 3))
    with pytest.raises(ValueError, match="expected a dense map"):
        active.gather(torch.zeros(2, 12, 8, 3))
    with pytest.raises(ValueError, match="do not divide"):
        active.gather_patches(torch.zeros(2, 3, 30, 48))
    with pytest.raises(ValueError, match="do not divide"):
        active.gather_patches(torch.zeros(1, 3, 32, 48))


@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9])
@pytest.mark.parametrize(("side", "tile"), [(8, 4), (8, 2), (8, 1), (4, 4), (4, 2), (4, 1), (2, 1), (2, 8), (16, 4)])
def test_tiles_are_the_patches_of_a_finer_mask(side, tile, kernel_size):
    """Tiles have the neighbours that they would have as patches, in the order in which their rows lie."""
    active = active_of(RAGGED, side)
    found = active.tile_neighbours(kernel_size, tile)
    if tile >= side:
        assert found is active.patch_neighbours(kernel_size)
        return
    tiles, across = side // tile, 2 * reach(kernel_size, tile) + 1
    corners = active.coordinates[:: tile * tile]
    number = {tuple(corner): row for row, corner in enumerate(corners.tolist())}
    assert found.shape == (active.num_patches * tiles**2, across**2)
    assert found.dtype == torch.int32
    for row, (image, y, x) in enumerate(corners.tolist()):
        steps = [(step - across // 2) * tile for step in range(across)]
        expected = [number.get((image, y + dy, x + dx), -1) for dy in steps for dx in steps]
        assert found[row].tolist() == expected

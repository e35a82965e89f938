"""Which cells are visible, in which order their features are stored, and the tables derived from that.

Shape letters used here and in the backends:
    B images, gh × gw patches an image, L = gh·gw, P visible patches in the batch, s cells a patch side,
    N = P·s² active cells, C channels, K kernel size, R = patches reached by a kernel on each side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from sparse_ops.workspace import Workspace

MAX_SIDE = 64

_Make = TypeVar("_Make", bound=Callable[..., Tensor])


def morton_coordinates(side: int) -> list[tuple[int, int]]:
    """(y, x) of the cells of a ``side × side`` patch in Z-order (Morton order), x in the lowest bit.

    Every aligned run of 4 entries is one 2×2 group of cells, so a stride-2 reduction of Z-ordered rows is a reshape.
    """
    if side < 1 or side > MAX_SIDE or side & (side - 1):
        raise ValueError(f"side must be a power of two between 1 and {MAX_SIDE}, got {side}")
    cells = [(0, 0)]
    for bit in range(side.bit_length() - 1):
        cells = [(y + (dy << bit), x + (dx << bit)) for dy in (0, 1) for dx in (0, 1) for y, x in cells]
    return cells


def _morton_table(side: int, device: torch.device) -> Tensor:
    """``[side², 2]`` int64: :func:`morton_coordinates`, made on ``device``, which need not wait for the host then."""
    bit = torch.arange(side.bit_length() - 1, device=device)
    place = torch.arange(side * side, device=device)[:, None]
    return torch.stack([((place >> (2 * bit + odd) & 1) << bit).sum(1) for odd in (1, 0)], dim=1)


def _kept(make: _Make) -> _Make:
    """The table that a method makes, once for its arguments. Not a cached_property, whose lock (Python < 3.12)
    torch.compile does not trace."""

    @wraps(make)
    def kept(self: Any, *arguments: int) -> Tensor:
        key = (make.__name__, *arguments)
        if key not in self._tables:
            with torch.inference_mode(False):  # else no later pass could be differentiated
                self._tables[key] = make(self, *arguments)
        return self._tables[key]

    return cast(_Make, kept)


def _around(
    coordinates_M3: Tensor, size: tuple[int, int, int], reached: int, nothing: int, dtype: torch.dtype
) -> Tensor:
    """``[M, (2·reached + 1)²]``: which of M places (image, y, x) of ``[B, H, W]`` is around each, else ``nothing``."""
    batch, height, width = size
    device = coordinates_M3.device
    shape = batch, height + 2 * reached, width + 2 * reached
    index = torch.full(shape, nothing, dtype=dtype, device=device)
    image, y, x = coordinates_M3.unbind(1)
    index[image, y + reached, x + reached] = torch.arange(coordinates_M3.shape[0], dtype=dtype, device=device)
    step = torch.arange(2 * reached + 1, device=device)
    table = index[image[:, None, None], y[:, None, None] + step[:, None], x[:, None, None] + step]
    return table.flatten(1)


class _PatchIndex:
    """The visible patches of a batch: shared by the active sets of all stages, so that tables are built once."""

    def __init__(self, flat_P: Tensor, batch_size: int, grid_size: tuple[int, int], counts: tuple[int, ...]) -> None:
        self.flat_P, self.counts = flat_P, counts
        self.batch_size, self.grid_size = batch_size, grid_size
        self.workspace = Workspace()
        self.backend_cache: dict[Any, Any] = {}
        self._tables: dict[Any, Tensor] = {}
        gh, gw = grid_size
        within = flat_P % (gh * gw)
        self.coordinates_P3 = torch.stack((flat_P // (gh * gw), within // gw, within % gw), dim=1)

    @_kept
    def neighbours(self, reached: int) -> Tensor:
        return _around(self.coordinates_P3, (self.batch_size, *self.grid_size), reached, -1, torch.int32)


class ActiveSet:
    """The cells of all visible patches of a batch at one stage. Immutable; tables are computed once and cached.

    Rows of a feature matrix ``[N, C]`` are ordered by image, then by patch (row-major over the patch grid), then by
    cell in Z-order inside the patch (:func:`morton_coordinates`). Everything follows from the mask: a visible cell
    whose features are all zero is still active.

    Build one with :meth:`from_mask`; go to the next, coarser stage with :meth:`down`.
    """

    def __init__(self, patches: _PatchIndex, side: int) -> None:
        morton_coordinates(side)
        self._patches, self.side = patches, side
        self._tables: dict[Any, Tensor] = {}
        self.device, self.batch_size = patches.flat_P.device, patches.batch_size
        self.grid_size = patches.grid_size
        """Patches (gh, gw) of an image, masked ones included."""
        self.map_size = patches.grid_size[0] * side, patches.grid_size[1] * side
        """Cells (H, W) of the dense feature map at this stage."""
        self.num_patches = patches.flat_P.numel()
        """P, the visible patches of the whole batch."""
        self.num_cells = self.num_patches * side * side
        """N, the rows of a feature matrix."""
        self.workspace = patches.workspace
        """Memory for temporaries, shared by all stages of a pass."""
        self.backend_cache = patches.backend_cache
        """What backends keep about the visible patches; shared by all stages of a pass, as the patches are."""
        self.patch_index = patches.flat_P
        """``[P]`` int64: each visible patch's place among all patches of the batch, ``image · L + patch``."""
        self.patch_coordinates = patches.coordinates_P3
        """``[P, 3]`` int64: image, patch row, patch column."""

    @classmethod
    def from_mask(
        cls, mask: Tensor, grid_size: tuple[int, int] | None = None, side: int = 8, *, keep: int | None = None
    ) -> ActiveSet:
        """Active set of a mask in which 1 (or True) is masked and 0 (or False) is visible.

        Args:
            mask: ``[B, L]`` with L patches row-major over ``grid_size``, or ``[B, gh, gw]``.
            grid_size: (gh, gw); required for a ``[B, L]`` mask.
            side: cells a patch side at this stage, a power of two (8 after the stem).
            keep: number of visible patches, promised to be the same for every image. Giving it avoids reading the
                mask back to the host; it is the caller's word, not checked. Without it counts are read from the
                mask and may differ from image to image, none included.

        Raises:
            ValueError: if the shape of the mask and ``grid_size`` do not agree, or ``keep`` is out of range.
        """
        if mask.dim() == 3:
            if grid_size is not None and tuple(mask.shape[1:]) != tuple(grid_size):
                raise ValueError(f"mask has a patch grid of {tuple(mask.shape[1:])}, grid_size says {tuple(grid_size)}")
            grid_size = (mask.shape[1], mask.shape[2])
            mask = mask.flatten(1)
        if mask.dim() != 2 or grid_size is None:
            raise ValueError(
                f"mask must be [B, gh, gw], or [B, L] with grid_size given; got shape {tuple(mask.shape)} "
                f"and grid_size={grid_size}"
            )
        batch_size, num_patches = mask.shape
        gh, gw = int(grid_size[0]), int(grid_size[1])
        if gh * gw != num_patches or gh < 0:
            raise ValueError(f"mask has {num_patches} patches an image, but grid_size {gh}×{gw} has {gh * gw}")
        masked = mask != 0
        if keep is not None:
            if not 0 <= keep <= num_patches:
                raise ValueError(f"keep={keep} is not between 0 and {num_patches}")
            order = torch.argsort(masked.to(torch.uint8), dim=1, stable=True)[:, :keep]
            first = torch.arange(batch_size, device=mask.device)[:, None] * num_patches
            return cls(_PatchIndex((order + first).flatten(), batch_size, (gh, gw), (keep,) * batch_size), side)
        counts = tuple((~masked).sum(1).tolist())
        return cls(_PatchIndex((~masked).flatten().nonzero().flatten(), batch_size, (gh, gw), counts), side)

    @classmethod
    def full(
        cls, batch_size: int, grid_size: tuple[int, int], side: int = 8, device: torch.device | None = None
    ) -> ActiveSet:
        """Active set with every patch of every image visible."""
        if min(grid_size) < 0 or batch_size < 0:
            raise ValueError(f"a batch of {batch_size} images of {grid_size[0]}×{grid_size[1]} patches is none")
        num_patches = grid_size[0] * grid_size[1]
        flat = torch.arange(batch_size * num_patches, device=device)
        return cls(_PatchIndex(flat, batch_size, (grid_size[0], grid_size[1]), (num_patches,) * batch_size), side)

    def down(self) -> ActiveSet:
        """The same patches at the next stage, with half as many cells a side; ValueError if a patch is one already."""
        if self.side == 1:
            raise ValueError("a patch is a single cell here; there is no coarser stage")
        return ActiveSet(self._patches, self.side // 2)

    @property
    def cell_counts(self) -> tuple[int, ...]:
        """Active cells of each image."""
        return tuple(c * self.side * self.side for c in self._patches.counts)

    @property
    def uniform_count(self) -> int | None:
        """Active cells of every image if all have the same number, else None."""
        counts = self._patches.counts
        return counts[0] * self.side * self.side if counts and min(counts) == max(counts) else None

    @property
    @_kept
    def row_offsets(self) -> Tensor:
        """``[B + 1]`` int64: image b owns rows ``row_offsets[b]`` to ``row_offsets[b + 1]``."""
        count = self.uniform_count
        if count is not None:
            return torch.arange(self.batch_size + 1, device=self.device) * count
        return torch.tensor((0, *self.cell_counts), device=self.device).cumsum(0)

    @property
    @_kept
    def image_index(self) -> Tensor:
        """``[N]`` int64: the image each row belongs to."""
        return self.patch_coordinates[:, 0].repeat_interleave(self.side * self.side, output_size=self.num_cells)

    @property
    @_kept
    def coordinates(self) -> Tensor:
        """``[N, 3]`` int64: image, row y and column x of each active cell on the dense map."""
        within = _morton_table(self.side, self.device)
        corner = self.patch_coordinates[:, None, 1:] * self.side
        yx = (corner + within[None]).flatten(0, 1)
        return torch.cat((self.image_index[:, None], yx), dim=1)

    def patch_neighbours(self, kernel_size: int) -> Tensor:
        """``[P, (2R + 1)²]`` int32: the visible patch at each neighbouring position, -1 where masked or outside.

        R is the number of patches an odd ``kernel_size`` reaches on each side of a patch at this stage.
        """
        return self._patches.neighbours(reach(kernel_size, self.side))

    @_kept
    def tile_neighbours(self, kernel_size: int, tile: int) -> Tensor:
        """The same for tiles of ``tile × tile`` cells, a power of two, where patches are larger than that.

        Cells are in Z-order, so the tiles of a patch are runs of rows too, and rows are those of an active set of
        smaller patches: ``[P·m², (2R + 1)²]`` int32 with m tiles a patch side, R tiles reached.
        """
        if self.side <= tile:
            return self.patch_neighbours(kernel_size)
        across, reached = self.side // tile, reach(kernel_size, tile)
        step = torch.arange(-reached, reached + 1, device=self.device)
        y, x = (own[:, None] + step for own in _morton_table(across, self.device).unbind(1))  # [m², 2R + 1]
        patches = reach(kernel_size, self.side)
        patch_y, patch_x = (position.div(across, rounding_mode="floor") + patches for position in (y, x))
        patch = patch_y[:, :, None] * (2 * patches + 1) + patch_x[:, None, :]
        bit = torch.arange(across.bit_length() - 1, device=self.device)
        place_y, place_x = (((v % across)[..., None] >> bit & 1) << (2 * bit) for v in (y, x))
        place = 2 * place_y.sum(-1)[:, :, None] + place_x.sum(-1)[:, None, :]
        source = self.patch_neighbours(kernel_size)[:, patch.flatten()]
        found = torch.where(source < 0, -1, source * across**2 + place.flatten())
        return found.view(-1, (2 * reached + 1) ** 2).int()

    @_kept
    def cell_neighbours(self, kernel_size: int) -> Tensor:
        """``[N, K²]`` int64: the row under each tap, row-major over the kernel, and N where there is none.

        Large (``N·K²·8`` bytes): for the readable reference, not for fast backends.
        """
        size = (self.batch_size, *self.map_size)
        return _around(self.coordinates, size, reach(kernel_size, 1), self.num_cells, torch.int64)

    def densify(self, x: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        """Rows ``[N, C]`` placed on a dense map ``[B, H, W, C]``; other cells hold ``fill`` (a number or ``[C]``)."""
        self.check_rows(x)
        height, width = self.map_size
        shape = (self.batch_size, height, width, x.shape[1])
        dense = fill.to(x.dtype).expand(shape) if isinstance(fill, Tensor) else x.new_full(shape, fill)
        return dense.index_put(tuple(self.coordinates.unbind(1)), x)

    def gather(self, dense: Tensor) -> Tensor:
        """The active cells of a dense map ``[B, H, W, C]`` as rows ``[N, C]``."""
        expected = (self.batch_size, *self.map_size)
        if tuple(dense.shape[:3]) != expected:
            raise ValueError(f"expected a dense map [{expected}, C] in channels-last order, got {tuple(dense.shape)}")
        return dense[tuple(self.coordinates.unbind(1))]

    def gather_patches(self, images: Tensor) -> Tensor:
        """Pixels of the visible patches, cell by cell, for the stem.

        Args:
            images: ``[B, C, H, W]`` with H and W divisible by the patch grid at this stage.

        Returns:
            ``[N, C·k·k]`` in the active set's order, where k is the number of pixels a cell side. The layout of a row
            is that of a convolution weight ``[out, C, k, k]`` flattened after its first axis.
        """
        batch, channels, height, width = images.shape
        gh, gw = self.grid_size
        if batch != self.batch_size or height % (gh * self.side) or width % (gw * self.side):
            raise ValueError(
                f"images {tuple(images.shape)} do not divide into {self.batch_size} × {gh}×{gw} patches "
                f"of {self.side}×{self.side} cells"
            )
        ky, kx = height // (gh * self.side), width // (gw * self.side)
        # A line of pixels of a cell is contiguous: taking those of the visible patches, cells in Z-order, is one
        # fast selection.
        y, x = _morton_table(self.side, images.device)[:, :, None, None].unbind(1)
        line = y * ky + torch.arange(ky, device=images.device)
        within = (line + torch.arange(channels, device=images.device)[:, None] * height) * (gw * self.side) + x
        image, py, px = self.patch_coordinates.unbind(1)
        corner = (image * (channels * height) + py * (self.side * ky)) * (gw * self.side) + px * self.side
        index = (corner[:, None] + within.flatten()).flatten()
        return images.contiguous().view(-1, kx).index_select(0, index).view(self.num_cells, channels * ky * kx)

    def check_rows(self, x: Tensor) -> None:
        """Raise ValueError unless ``x`` is ``[N, C]`` with this set's N."""
        if x.dim() != 2 or x.shape[0] != self.num_cells:
            raise ValueError(f"expected features [{self.num_cells}, C] for this active set, got {tuple(x.shape)}")

    def __repr__(self) -> str:
        return (
            f"ActiveSet(batch={self.batch_size}, grid={self.grid_size}, side={self.side}, "
            f"visible={self._patches.counts}, cells={self.num_cells}, device={self.device})"
        )


def reach(kernel_size: int, side: int) -> int:
    """Patches that a kernel of odd ``kernel_size`` reaches on each side of a patch of ``side`` cells."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    return -(-(kernel_size // 2) // side)

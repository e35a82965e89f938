"""The dense oracle, and the conformance cases that every backend must pass. For backend authors and for our tests.

The oracle computes the sparse operations the obvious way: put the rows on a dense map, convolve it, read the visible
cells, all in float64. Its coordinates come from plain loops below and share no code with the active set or a backend.

Tolerance. The error of a backend against the oracle may be at most twice the error of the plain torch computation in
the same dtype, plus a floor, stated where it is computed. Errors are the largest absolute difference of a tensor.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_ops import functional
from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend, get_backend
from sparse_ops.grid import DenseGrid, GRNScope

NORM_EPS = 1e-6


def visible_from_text(*images: str) -> Tensor:
    """``[B, gh, gw]`` bool, True = visible, from one text an image: rows by ``/``, ``.`` visible, ``#`` masked."""
    return torch.tensor([[[char == "." for char in row] for row in image.split("/")] for image in images])


def cell_coordinates(visible: Tensor, side: int) -> list[tuple[int, int, int]]:
    """(image, y, x) of every visible cell, in the order in which an active set stores its rows.

    Args:
        visible: ``[B, gh, gw]``, True = visible.
        side: cells a patch side, a power of two.
    """
    cells = []
    for image, rows in enumerate(visible.tolist()):
        for patch_row, row in enumerate(rows):
            for patch_column, is_visible in enumerate(row):
                if not is_visible:
                    continue
                for position in range(side * side):
                    x = y = 0
                    for bit in range(side.bit_length()):
                        x |= (position >> (2 * bit) & 1) << bit
                        y |= (position >> (2 * bit + 1) & 1) << bit
                    cells.append((image, patch_row * side + y, patch_column * side + x))
    return cells


def _dense_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor, side: int) -> Tensor:
    """Densify, convolve, gather in the dtype of ``x``."""
    batch, height, width = visible.shape[0], visible.shape[1] * side, visible.shape[2] * side
    cells = cell_coordinates(visible, side)
    flat = torch.tensor([(b * height + y) * width + x_ for b, y, x_ in cells], dtype=torch.long, device=x.device)
    rows = x.new_zeros(batch * height * width, x.shape[1]).index_copy(0, flat, x)
    dense = rows.view(batch, height, width, -1).permute(0, 3, 1, 2)
    out = F.conv2d(dense, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return out.permute(0, 2, 3, 1).reshape(batch * height * width, -1).index_select(0, flat)


def oracle_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor, side: int) -> Tensor:
    """Depthwise convolution over the visible cells in float64, through a dense map. Differentiable.

    Args:
        x: ``[N, C]``, rows ordered by image, patch (row-major) and Z-order inside the patch.
        weight: ``[C, 1, K, K]``.
        bias: ``[C]`` or None.
        visible: ``[B, gh, gw]``, True = visible.
        side: cells a patch side.

    Returns:
        ``[N, C]`` float64.
    """
    wide_bias = None if bias is None else bias.double()
    return _dense_depthwise(x.double(), weight.double(), wide_bias, visible, side)


# Cases ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConformanceCase:
    """One set of shapes for :func:`check_conformance`.

    Args:
        name: what the case is about.
        images: the masks, one text an image, see :func:`visible_from_text`.
        channels: C.
        side: cells a patch side.
        kernel_size: K; a backend that rejects it skips the case.
        bias: whether there is one.
        contiguous: False passes transposed and strided views of x, weight and the incoming gradient.
        seed: of the values.
    """

    name: str
    images: tuple[str, ...]
    channels: int = 13
    side: int = 8
    kernel_size: int = 7
    bias: bool = True
    contiguous: bool = True
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def visible(self) -> Tensor:
        """``[B, gh, gw]`` bool, True = visible."""
        return visible_from_text(*self.images)

    def values(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """x ``[N, C]``, weight ``[C, 1, K, K]``, bias ``[C]`` and the incoming gradient ``[N, C]``, drawn normal.

        Random weights have no symmetry, so reversed or transposed taps do not pass.
        """
        generator = torch.Generator().manual_seed(self.seed)
        cells, channels, kernel = int(self.visible.sum()) * self.side**2, self.channels, self.kernel_size
        shapes = {"x": (cells, channels), "weight": (channels, 1, kernel, kernel), "grad": (cells, channels)}
        if self.bias:
            shapes["bias"] = (channels,)
        made = {}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
            if not self.contiguous and value.dim() > 1:
                value = value.transpose(0, -1).contiguous().transpose(0, -1)
            elif not self.contiguous:
                value = torch.stack((value, value), dim=1)[:, 0]
            made[name] = value
        return made


CASES: tuple[ConformanceCase, ...] = (
    ConformanceCase("one visible patch", ("###/#.#/###",), channels=1),
    ConformanceCase("one visible patch in a corner", (".##/###",), channels=40),
    ConformanceCase("every patch visible", (".../.../...", ".../.../..."), channels=40),
    ConformanceCase("C=1", ("..#/#.#/...", "#.#/.../##."), channels=1),
    ConformanceCase("C=13", ("..#/#.#/...", "#.#/.../##."), channels=13),
    ConformanceCase("C=40", ("..#/#.#/...", "#.#/.../##."), channels=40),
    ConformanceCase("C=96", ("..#/#.#/...",), channels=96),
    ConformanceCase("ragged, an image without visible patches", ("..#/#.#", "###/###", ".../..."), channels=13),
    ConformanceCase("ragged, first image without visible patches", ("##/##", ".#/#."), channels=16, side=4),
    ConformanceCase("nothing visible", ("##/##", "##/##"), channels=8),
    ConformanceCase("last row and column masked everywhere", ("..#/.##/###", "#.#/..#/###"), channels=40),
    ConformanceCase("wide grid", ("..#.#", "#..##"), channels=13),
    ConformanceCase("tall grid", ("./#/././.", "#/./././#"), channels=13, side=4),
    ConformanceCase("side 4", ("..#./#.#./....", "#.#./...#/##.."), channels=40, side=4),
    ConformanceCase("side 2, a kernel over several patches", ("..#./#.#./....", "#.#./...#/##.."), channels=80, side=2),
    ConformanceCase(
        "side 1, a patch a cell", ("..#.#../#.#..##/....#..", "#.#.##./...#..#/##..#.."), channels=96, side=1
    ),
    ConformanceCase("kernel 3", ("..#/#.#/...", "#.#/.../##."), channels=13, kernel_size=3),
    ConformanceCase("kernel 5, side 2", ("..#./#.#./....", "#.#./...#/##.."), channels=13, kernel_size=5, side=2),
    ConformanceCase("kernel 1", ("..#/#.#",), channels=13, kernel_size=1, side=4),
    ConformanceCase("kernel 9, side 2", ("..#./#.#./....",), channels=5, kernel_size=9, side=2),
    ConformanceCase("no bias", ("..#/#.#", "#.#/..#"), channels=13, bias=False),
    ConformanceCase("non-contiguous", ("..#/#.#", "#.#/..#"), channels=40, contiguous=False),
    ConformanceCase("non-contiguous, side 1", ("..#./#.#.", "#.#./..#."), channels=13, side=1, contiguous=False),
)
"""What every backend must pass, in every dtype it serves."""


def random_case(seed: int) -> ConformanceCase:
    """A small case drawn from ``seed``: grid, masks (ragged, empty images included), channels, side and kernel size."""
    draw = random.Random(seed)
    side = draw.choice((1, 2, 4, 8))
    rows, columns = draw.randint(1, 24 // side if side > 4 else 4), draw.randint(1, 24 // side if side > 4 else 4)
    density = draw.choice((0.15, 0.4, 0.8))
    images = tuple(
        "/".join("".join("." if draw.random() < density else "#" for _ in range(columns)) for _ in range(rows))
        for _ in range(draw.randint(1, 3))
    )
    return ConformanceCase(
        f"random {seed}",
        images,
        channels=draw.choice((1, 2, 3, 7, 8, 13, 16, 17, 31, 32, 40)),
        side=side,
        kernel_size=draw.choice((7, 7, 7, 5, 3)),
        bias=draw.random() < 0.8,
        contiguous=draw.random() < 0.8,
        seed=seed,
    )


# Checks --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deviation:
    """Largest absolute errors against the oracle of one tensor, and what was allowed."""

    error: float
    plain_error: float
    floor: float
    scale: float

    @property
    def allowed(self) -> float:
        return 2 * self.plain_error + self.floor

    @property
    def relative(self) -> float:
        """The error over the largest absolute value of the oracle."""
        return self.error / self.scale if self.scale else self.error


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _error(x: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference; infinite where ``x`` is not finite."""
    if x.shape != oracle.shape:
        raise AssertionError(f"expected shape {tuple(oracle.shape)}, got {tuple(x.shape)}")
    difference = x.detach().cpu().double() - oracle
    return _largest(torch.where(difference.isfinite(), difference, torch.inf))


def _compare(
    what: str,
    results: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    floors: Mapping[str, float],
) -> dict[str, Deviation]:
    found: dict[str, Deviation] = {}
    for name, expected in oracle.items():
        if not bool(expected.isfinite().all()):
            raise AssertionError(f"{what}: the oracle itself is not finite for {name}")
        try:
            error = _error(results[name], expected)
        except AssertionError as mismatch:
            raise AssertionError(f"{what}: {name}: {mismatch}") from None
        found[name] = Deviation(error, _error(plain[name], expected), floors[name], _largest(expected))
    wrong = [
        f"{name}: error {d.error:.3g} > 2 × {d.plain_error:.3g} + {d.floor:.3g} (values up to {d.scale:.3g})"
        for name, d in found.items()
        if not d.error <= d.allowed
    ]
    if wrong:
        raise AssertionError(f"{what}: {'; '.join(wrong)}")
    return found


def _run(function: Callable[..., Tensor], leaves: Mapping[str, Tensor | None], grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients of ``function(**leaves)`` for the incoming gradient ``grad``."""
    inputs = {k: v if v is None else v.detach().requires_grad_() for k, v in leaves.items()}
    out = function(**inputs)
    wanted = {k: v for k, v in inputs.items() if v is not None}
    grads = torch.autograd.grad(out, list(wanted.values()), grad)
    return {"output": out.detach(), **{f"grad of {k}": g for k, g in zip(wanted, grads, strict=True)}}


def _double(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu().double() for name, value in values.items()}


def check_conformance(
    backend: str | Backend,
    case: ConformanceCase,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Deviation]:
    """Compare the depthwise convolution of a backend, and all its gradients, with the oracle.

    The floor of a tensor is ``2 · eps(accumulator) · S + eps(dtype) / 2 · max|oracle|``: S is the largest sum of
    absolute terms (the same operation on absolute values), which bounds what any order of summation rounds, with
    float32 as the accumulator of 16-bit types; the second term is the rounding of the stored result.

    Returns:
        The errors of ``output``, ``grad of x``, ``grad of weight`` and ``grad of bias``.

    Raises:
        AssertionError: naming the tensors that are further off than the rule allows.
        ValueError: if the backend rejects the dtype, device or kernel size.
    """
    backend = get_backend(backend) if isinstance(backend, str) else backend
    visible, side = case.visible, case.side
    values = case.values(dtype, device)
    grad = values.pop("grad")
    leaves: dict[str, Tensor | None] = {"bias": None, **values}
    active = ActiveSet.from_mask((~visible).to(device, torch.float32), side=side)

    def sparse(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.depthwise_conv(x, weight, bias, active, backend)

    def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _dense_depthwise(x, weight, bias, visible, side)

    exact: dict[str, Tensor | None] = {"bias": None, **_double(values)}
    absolute = {name: None if value is None else value.abs() for name, value in exact.items()}
    oracle = _run(dense, exact, grad.cpu().double())
    terms = _run(dense, absolute, grad.cpu().double().abs())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = _run(dense, leaves, grad)
    accumulator, storage = torch.finfo(_wide(dtype)).eps, torch.finfo(dtype).eps
    floors = {k: 2 * accumulator * _largest(terms[k]) + storage / 2 * _largest(oracle[k]) for k in oracle}
    what = f"{backend.name}, {case.name}, {dtype}, {torch.device(device).type}"
    return _compare(what, _run(sparse, leaves, grad), plain, oracle, floors)


@dataclass(frozen=True)
class MLPCase:
    """One set of shapes for :func:`check_mlp_conformance`.

    Args:
        name: what the case is about.
        counts: rows of each image.
        channels: C; the hidden layer has 4·C.
        scope: whether GRN norms are taken over each image or over the batch.
        dead_channel: makes one hidden channel exactly zero everywhere, so that its norm is 0.
        tails: spreads the arguments of GELU from -30 to 30.
        seed: of the values.
    """

    name: str
    counts: tuple[int, ...]
    channels: int = 8
    scope: GRNScope = "image"
    dead_channel: bool = False
    tails: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def row_offsets(self) -> Tensor:
        """``[G + 1]`` int64 on the host: the rows of each group."""
        offsets = torch.tensor((0, *self.counts)).cumsum(0)
        return offsets if self.scope == "image" else offsets[[0, -1]]

    def values(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """x ``[N, C]``, the eight parameters in the shapes of :func:`sparse_ops.convnext_mlp`, and ``grad``."""
        generator = torch.Generator().manual_seed(self.seed)
        rows, dim = sum(self.counts), self.channels

        def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift

        values = {
            "x": normal(rows, dim, scale=2.0, shift=0.3),
            "norm_weight": normal(dim, scale=0.3, shift=1.0),
            "norm_bias": normal(dim, scale=0.3),
            "w1": normal(4 * dim, dim, scale=dim**-0.5),
            "b1": normal(4 * dim, scale=0.5),
            "gamma": normal(4 * dim),
            "beta": normal(4 * dim),
            "w2": normal(dim, 4 * dim, scale=(4 * dim) ** -0.5),
            "b2": normal(dim),
            "grad": normal(rows, dim),
        }
        if self.tails:
            values["b1"] = torch.linspace(-30, 30, 4 * dim, dtype=torch.float64)
        if self.dead_channel:
            values["w1"][1] = 0
            values["b1"][1] = 0
        return {name: value.to(device, dtype) for name, value in values.items()}


MLP_CASES: tuple[MLPCase, ...] = (
    MLPCase("one image", (64,)),
    MLPCase("uniform", (48, 48, 48), channels=13),
    MLPCase("uniform, C=40", (76, 76), channels=40),
    MLPCase("one row an image", (1, 1, 1), channels=16),
    MLPCase("ragged", (16, 4, 36), channels=13),
    MLPCase("an image without rows", (16, 0, 36), channels=8),
    MLPCase("first and last image without rows", (0, 16, 0), channels=8),
    MLPCase("no rows at all", (0, 0), channels=8),
    MLPCase("batch scope", (48, 48), channels=13, scope="batch"),
    MLPCase("batch scope, ragged, an image without rows", (16, 0, 36), channels=8, scope="batch"),
    MLPCase("C=3", (16, 16), channels=3),
    MLPCase("C=12, parts of a vector", (16, 50, 3), channels=12),
    MLPCase("C=20, batch scope", (47, 49), channels=20, scope="batch"),
    MLPCase("C=196", (20, 31), channels=196),
    MLPCase("dead channel", (16, 4, 36), channels=8, dead_channel=True),
    MLPCase("dead channel, batch scope", (16, 16), channels=13, scope="batch", dead_channel=True),
    MLPCase("tails of GELU", (64, 64), channels=40, tails=True),
    MLPCase("many rows", (700, 901), channels=8),
)
"""What every backend that fuses the pointwise half of a block must pass, in every dtype it fuses."""


def plain_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    row_offsets: Tensor,
) -> Tensor:
    """LayerNorm, linear, GELU, GRN, linear as separate torch operations; arguments as :func:`sparse_ops.convnext_mlp`.

    GRN takes its norms in float32 or wider.
    """
    h = F.gelu(F.linear(F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, NORM_EPS), w1, b1))
    wide = h.to(_wide(h.dtype))
    groups = []
    for start, stop in zip(row_offsets[:-1].tolist(), row_offsets[1:].tolist(), strict=True):
        energy = wide[start:stop].square().sum(0)
        alive = energy > 0
        norm = torch.where(alive, torch.where(alive, energy, 1).sqrt(), 0)
        scale = 1 + gamma.to(wide.dtype) * norm / (norm.mean() + NORM_EPS)
        groups.append(h[start:stop] * scale.to(h.dtype) + beta)
    return F.linear(torch.cat(groups), w2, b2)


def check_mlp_conformance(
    backend: str | Backend,
    case: MLPCase,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Deviation]:
    """Compare the fused pointwise half of a block, and its nine gradients, with separate operations in float64.

    The plain computation runs in two orders of the rows, the second reversed, and the larger error counts: sums over
    rows round differently in each, and in float64 only the second shows any error. The floor of a tensor is
    ``4 · eps(dtype) · max|oracle|``.

    Returns:
        The errors of ``output`` and of ``grad of x``, ``norm_weight``, ``norm_bias``, ``w1``, ``b1``, ``gamma``,
        ``beta``, ``w2`` and ``b2``.

    Raises:
        AssertionError: naming the tensors that are further off than the rule allows.
        ValueError: if the backend does not fuse this dtype on this device.
    """
    backend = get_backend(backend) if isinstance(backend, str) else backend
    if not backend.fuses_mlp(torch.device(device), dtype):
        raise ValueError(f"backend {backend.name!r} does not fuse the MLP for {dtype} on {torch.device(device).type}")
    values = case.values(dtype, device)
    grad = values.pop("grad")
    offsets = case.row_offsets

    def fused(
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        w1: Tensor,
        b1: Tensor,
        gamma: Tensor,
        beta: Tensor,
        w2: Tensor,
        b2: Tensor,
    ) -> Tensor:
        parts = ((norm_weight, norm_bias), (w1, b1), (gamma, beta), (w2, b2))
        return functional.convnext_mlp(x, *parts, offsets.to(x.device), backend, norm_eps=NORM_EPS, grn_eps=NORM_EPS)

    def reversed_plain(x: Tensor, **parameters: Tensor) -> Tensor:
        flipped_offsets = (offsets[-1] - offsets).flip(0)
        return plain_mlp(x.flip(0), **parameters, row_offsets=flipped_offsets).flip(0)

    def plain(x: Tensor, **parameters: Tensor) -> Tensor:
        return plain_mlp(x, **parameters, row_offsets=offsets)

    oracle = _run(plain, _double(values), grad.cpu().double())
    ordinary, reverse = _run(plain, values, grad), _run(reversed_plain, values, grad)
    for name, value in reverse.items():
        if _error(value, oracle[name]) > _error(ordinary[name], oracle[name]):
            ordinary[name] = value
    floors = {name: 4 * torch.finfo(dtype).eps * _largest(value) for name, value in oracle.items()}
    what = f"{backend.name}, fused MLP, {case.name}, {dtype}, {torch.device(device).type}"
    return _compare(what, _run(fused, values, grad), ordinary, oracle, floors)


# The dense network that computes what the sparse one computes --------------------------------------------------------


class MaskedDenseGrid(DenseGrid):
    """A dense grid, re-masked so that its visible cells hold exactly what a sparse grid computes.

    Only two operations see other cells: the depthwise convolution, whose input is masked, and the sums of GRN, which
    are taken over visible cells. Everything else leaves garbage in masked cells, which costs nothing to ignore. That
    makes it the fastest dense implementation of the sparse network, and independent of the active set; pixels of
    masked patches must be finite, though.

    Args:
        visible: ``[B, gh, gw]``, True = visible.
        side: cells a patch side at this stage.
        grn_scope: see :class:`sparse_ops.Grid`.
        dtype: of the mask that features are multiplied by; that of the features saves a conversion.
    """

    def __init__(
        self,
        visible: Tensor,
        side: int = 8,
        grn_scope: GRNScope = "image",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(visible.shape[0], grn_scope)
        self.visible = visible
        self.side = side
        self.dtype = dtype
        batch, gh, gw = visible.shape
        cells = visible.to(dtype)[:, :, None, :, None].expand(batch, gh, side, gw, side)
        self.cells = cells.reshape(batch, gh * side, gw * side, 1)
        """``[B, H, W, 1]``: 1 in visible cells, 0 in masked ones."""

    def depthwise_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super().depthwise_conv(x * self.cells.to(x.dtype), weight, bias)

    def downsample(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, MaskedDenseGrid]:
        features, _ = super().downsample(x, weight, bias)
        return features, MaskedDenseGrid(self.visible, self.side // 2, self.grn_scope, self.dtype)

    def image_sum(self, x: Tensor) -> Tensor:
        cells = self.cells.to(x.dtype)
        if torch.compiler.is_compiling():
            return super().image_sum(x * cells)
        # The mask as a row vector: one pass over x where no compiler fuses the multiplication with the sum.
        with torch.autocast(x.device.type, enabled=False):
            return torch.bmm(cells.flatten(1).unsqueeze(1), x.flatten(1, 2)).squeeze(1)

    def gather(self, x: Tensor) -> Tensor:
        """The visible cells of ``[B, H, W, C]`` as rows ``[N, C]``, in the order of an active set."""
        index = torch.tensor(cell_coordinates(self.visible, self.side), device=x.device).reshape(-1, 3)
        return x[index[:, 0], index[:, 1], index[:, 2]]

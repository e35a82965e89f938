"""The cases of the conformance suite: masks, shapes and values."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparse_ops.grid import GRNScope
from sparse_ops.oracle import visible_from_text

Layout = Literal["contiguous", "transposed", "strided", "channels last"]


def in_layout(x: Tensor, layout: Layout) -> Tensor:
    """The same numbers with other strides: the first axis fastest, every second number of twice as much memory, or the
    second axis fastest; where the axes do not suffice, strided."""
    if layout == "contiguous":
        return x
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return torch.stack((x, torch.full_like(x, -1)), dim=-1)[..., 0]


@dataclass(frozen=True)
class ConformanceCase:
    """One set of shapes for :func:`check_conformance`; a backend that rejects the kernel size skips the case.

    Args:
        images: the masks, one text an image, see :func:`visible_from_text`.
        side: cells a patch side.
        layout: of x, weight, bias and the incoming gradient in memory.
    """

    name: str
    images: tuple[str, ...]
    channels: int = 13
    side: int = 8
    kernel_size: int = 7
    bias: bool = True
    layout: Layout = "contiguous"
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
        normal = {name: torch.randn(own, generator=generator, dtype=torch.float64) for name, own in shapes.items()}
        return {name: in_layout(value.to(device, dtype), self.layout) for name, value in normal.items()}


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
    ConformanceCase("transposed", ("..#/#.#", "#.#/..#"), channels=40, layout="transposed"),
    ConformanceCase("transposed, side 1", ("..#./#.#.", "#.#./..#."), channels=13, side=1, layout="transposed"),
    ConformanceCase("strided", ("..#/#.#", "#.#/..#"), channels=40, side=4, layout="strided"),
    ConformanceCase("channels last", ("..#/#.#", "#.#/..#"), channels=40, side=4, layout="channels last"),
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
        layout=draw.choice(("contiguous",) * 6 + ("transposed", "strided", "channels last")),
        seed=seed,
    )


@dataclass(frozen=True)
class MLPCase:
    """One set of shapes for :func:`check_mlp_conformance`.

    Args:
        counts: rows of each image.
        channels: C; the hidden layer has 4·C.
        dead_channel: makes one hidden channel exactly zero everywhere, so that its norm is 0.
        tails: spreads the arguments of GELU from -30 to 30.
        layout: of x, the weights, the offsets and the incoming gradient in memory.
    """

    name: str
    counts: tuple[int, ...]
    channels: int = 8
    scope: GRNScope = "image"
    dead_channel: bool = False
    tails: bool = False
    layout: Layout = "contiguous"
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def row_offsets(self) -> Tensor:
        """``[G + 1]`` int64 on the host: the rows of each group."""
        offsets = torch.tensor((0, *self.counts)).cumsum(0)
        return offsets if self.scope == "image" else offsets[[0, -1]]

    def values(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """x ``[N, C]``, the eight tensors of :class:`~sparse_ops.pointwise.MLPWeights`, and ``grad``."""
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
            values["w1"][1] = values["b1"][1] = 0
        return {name: in_layout(value.to(device, dtype), self.layout) for name, value in values.items()}


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
    MLPCase("transposed", (16, 4, 36), channels=40, layout="transposed"),
    MLPCase("strided", (16, 4, 36), channels=40, layout="strided"),
    MLPCase("transposed, an unusual width", (16, 4, 36), channels=13, layout="transposed"),
)
"""What every backend that fuses the pointwise half of a block must pass, in every dtype it fuses."""

"""The backend for NVIDIA GPUs: Triton kernels for float32, bfloat16 and float16, with sums in float32.

With ``TRITON_INTERPRET=1`` the same kernels run in Triton's interpreter on tensors in main memory: slow, and meant for
tests.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ops.active_set import ActiveSet, reach
from sparse_ops.backend import Backend
from sparse_ops.backends._operators import run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_SIZES = (3, 5, 7)
TUNED_FROM = 2**20
"""Numbers in the features from which block shapes are timed; smaller inputs say little, and take the first shape."""
PROGRAMS = 2048
"""About how many programs the weight gradient is cut into: some for each multiprocessor of any GPU. A constant, so that
the order of the sum, and with it the last bits, depend on the shapes alone."""


class Block(NamedTuple):
    """What one program takes: patches, channels, and the warps that share them."""

    patches: int
    channels: int
    warps: int


INTERPRETED = {
    "depthwise_kernel": Block(patches=64, channels=64, warps=1),
    "depthwise_weight_grad_kernel": Block(patches=16, channels=64, warps=1),
}
"""For the interpreter, where every program costs much the same however much it takes."""


TILE, WEIGHT_TILE = 4, 8
"""Cells a side that the convolution and the weight gradient take for a patch; larger ones are cut into tiles."""


ANY = 0
"""Of ``channels``: the kernel that takes any width, with more arithmetic for addresses."""


def kernel_width(channels: int) -> int:
    """``channels``, where that width has kernels of its own; networks have such widths. Else :data:`ANY`."""
    return channels if channels >= 32 and channels % 8 == 0 else ANY


def _widths(candidates: tuple[int, ...], channels: int) -> list[int]:
    """The two of the numbers of channels a program that leave the fewest idle; the best is first."""
    return sorted(candidates, key=lambda block: -(-channels // block) * block)[:2]


def depthwise_blocks(side: int, channels: int) -> list[Block]:
    """Block shapes of the convolution worth trying: one patch and one warp."""
    if channels == ANY:
        return [Block(1, 32, 1)]
    return [Block(1, block, 1) for block in _widths((64, 32) if side > 2 else (256, 128, 64, 32), channels)]


def weight_grad_blocks(side: int, channels: int) -> list[Block]:
    """Those of the weight gradient: 8 numbers a thread, on one warp if possible; 4 where registers are few."""
    if channels == ANY:
        widths, warp = [32], 128
    else:
        widths, warp = _widths((64, 32, 128, 16) if side < 8 else (64, 32, 128), channels), 256  # 16 of 8 spill
    patches = [max(1, 256 // (side * block)) for block in widths]
    return [Block(p, block, p * side * block // warp) for p, block in zip(patches, widths, strict=True)]


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_only_compiling = False
"""Whether kernels are compiled where they would be launched."""


@contextlib.contextmanager
def only_compiling() -> Iterator[None]:
    """Kernels are compiled here, side by side, and not launched: operators return memory as it was.

    All of it is compiled when the context ends, and launched without delay from then on.
    """
    global _only_compiling
    from triton import AsyncCompileMode

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads, AsyncCompileMode(threads):
        before, _only_compiling = _only_compiling, True
        try:
            yield
        finally:
            _only_compiling = before


def _launch(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
    """Launch on the device of the first argument."""
    with torch.cuda.device(args[0].device) if args[0].is_cuda else contextlib.nullcontext():
        if _only_compiling:
            kernel.warmup(*args, grid=(1,), **constants)
        else:
            kernel[grid](*args, **constants)


@cache
def _kernels(half: str) -> Any:
    """The module of kernels of a ``half`` of the block, which imports triton."""
    return importlib.import_module(f"sparse_ops.backends._triton_{half}")


@cache
def _tuned(name: str, side: int, width: int, kernel_size: int, dtype: torch.dtype) -> Any:
    """The kernel, which times the block shapes when it first runs and keeps the fastest, also on disk."""
    import triton

    configs = [
        triton.Config({"PATCHES": block.patches, "BLOCK_C": block.channels}, num_warps=block.warps)
        for block in (depthwise_blocks if name == "depthwise_kernel" else weight_grad_blocks)(side, width)
    ]
    tune = triton.autotune(configs, key=["KERNEL", "SIDE", "CHANNELS"], cache_results=True)
    return tune(getattr(_kernels("depthwise"), name))


def _launch_depthwise(name: str, grid: Any, side: int, channels: int, kernel_size: int, x: Tensor, *args: Any) -> None:
    width = kernel_width(channels)
    constants = {"CHANNELS": width, "SIDE": side, "KERNEL": kernel_size, "REACH": reach(kernel_size, side)}
    if interpreting():
        block = INTERPRETED[name]
        kernel = getattr(_kernels("depthwise"), name)
        constants |= {"PATCHES": block.patches, "BLOCK_C": block.channels, "num_warps": block.warps}
    else:
        kernel = _tuned(name, side, width, kernel_size, x.dtype)
        chosen = getattr(kernel, "best_config", None)
        if chosen is None and x.numel() < TUNED_FROM and not _only_compiling:
            chosen = kernel.configs[0]
        if chosen is not None:  # past the autotuner, which takes as long as a launch
            kernel, constants = kernel.fn, constants | chosen.all_kwargs()
    _launch(kernel, grid, x, *args, channels, **constants)


@torch.library.custom_op("sparse_ops::triton_depthwise", mutates_args=())
def triton_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, side: int, reverse_taps: bool
) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.depthwise`; ``neighbours`` is the table of tiles ``[P, (2R + 1)²]``."""
    out = torch.empty_like(x)
    patches, channels, kernel_size = neighbours.shape[0], x.shape[1], weight.shape[-1]
    if not patches or not channels:
        return out
    # The gradient for x takes the same kernel, which takes seconds to compile: taps are reversed here.
    taps = weight.new_empty(kernel_size**2 + 1, channels, dtype=torch.float32)
    taps[:-1] = (weight.flatten(1).flip(1) if reverse_taps else weight.flatten(1)).t()
    taps[-1] = 0 if bias is None else bias

    def grid(sizes: dict[str, int]) -> tuple[int, int]:
        return -(-patches // sizes["PATCHES"]), -(-channels // sizes["BLOCK_C"])

    _launch_depthwise(
        "depthwise_kernel",
        grid,
        side,
        channels,
        kernel_size,
        x,
        taps,
        neighbours,
        out,
        patches,
    )
    return out


@triton_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, side: int, reverse_taps: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("sparse_ops::triton_depthwise_weight_grad", mutates_args=())
def triton_depthwise_weight_grad(x: Tensor, grad: Tensor, neighbours: Tensor, side: int, kernel_size: int) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.depthwise_weight_grad`."""
    patches, channels = neighbours.shape[0], x.shape[1]
    slices = weight_grad_slices(patches, channels, side, kernel_size)
    if not slices:
        return x.new_zeros(channels, 1, kernel_size, kernel_size)
    partial = x.new_empty(slices, kernel_size**2, channels, dtype=torch.float32)

    def grid(sizes: dict[str, int]) -> tuple[int, int, int]:
        return slices, -(-channels // sizes["BLOCK_C"]), kernel_size

    _launch_depthwise(
        "depthwise_weight_grad_kernel",
        grid,
        side,
        channels,
        kernel_size,
        x,
        grad,
        neighbours,
        partial,
        patches,
    )
    return partial.sum(0).t().to(x.dtype).contiguous().view(channels, 1, kernel_size, kernel_size)


@triton_depthwise_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, neighbours: Tensor, side: int, kernel_size: int) -> Tensor:
    return x.new_empty(x.shape[1], 1, kernel_size, kernel_size)


def weight_grad_slices(patches: int, channels: int, side: int, kernel_size: int) -> int:
    """Partial sums of the weight gradient; each costs ``K²·C`` numbers, and has 32 patches or 256 cells at least."""
    least = max(1, 256 // side**2) if side > 2 else 32
    wanted = 2 if interpreting() else PROGRAMS // (kernel_size * max(1, channels // 64))
    return min(-(-patches // least), max(1, wanted))


# The pointwise half of a block --------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Rows and columns that a program of a pointwise kernel takes at a time, and its warps."""

    rows: int
    columns: int
    warps: int = 4

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "BLOCK": self.columns, "num_warps": self.warps}


def _power_of_two(number: int, least: int = 16) -> int:
    return max(least, 1 << (number - 1).bit_length())


def norm_tile(channels: int) -> Tile:
    """For LayerNorm, whose programs hold whole rows: 16 numbers a thread or so."""
    columns = _power_of_two(channels)
    return Tile(128 if interpreting() else max(1, 2048 // columns), columns, 8 if columns > 2048 else 4)


def hidden_tile(dim: int) -> Tile:
    """For GELU and GRN."""
    return Tile(256, min(256, _power_of_two(dim))) if interpreting() else Tile(32, min(64, _power_of_two(dim)))


def scale_tile(dim: int) -> Tile:
    """For the kernels that take a group's norms, a row of them at a time."""
    return Tile(1, min(512 if interpreting() else 2048, _power_of_two(dim, 128)))


def _parts(rows: int, groups: int, dim: int, tile: Tile) -> int:
    """Parts that the rows of each group are cut into: enough programs for a GPU, by the shapes alone."""
    wanted = 2 * PROGRAMS // max(1, groups * -(-dim // tile.columns))
    return max(1, min(wanted, 256, -(-rows // (max(1, groups) * tile.rows))))


class _Hidden:
    """Launches the kernels that walk over the hidden layer: program (part, group, block of columns)."""

    def __init__(self, h: Tensor, row_offsets: Tensor) -> None:
        self.groups, self.dim = row_offsets.numel() - 1, h.shape[1]
        self.tile = hidden_tile(self.dim)
        self.parts = _parts(h.shape[0], self.groups, self.dim, self.tile)
        self._h = h

    def partial(self) -> Tensor:
        """Memory for a sum of each part, ``[groups, parts, dim]`` float32."""
        return self._h.new_empty(self.groups, self.parts, self.dim, dtype=torch.float32)

    def of_groups(self) -> Tensor:
        """Memory for a number of each group and channel, ``[groups, dim]`` float32."""
        return self._h.new_empty(self.groups, self.dim, dtype=torch.float32)

    def walk(self, kernel: Any, *args: Any) -> None:
        if self.groups:
            grid = self.parts, self.groups, -(-self.dim // self.tile.columns)
            _launch(kernel, grid, *args, WIDTH=self.dim, **self.tile.constants)

    def each_group(self, kernel: Any, *args: Any) -> None:
        if self.groups:
            tile = scale_tile(self.dim)
            _launch(kernel, (self.groups,), *args, WIDTH=self.dim, BLOCK=tile.columns, num_warps=tile.warps)


def _mlp_outputs(
    x: Tensor,
    parameters: list[Tensor],
    row_offsets: Tensor,
    rows: Tensor | None,
    norm_eps: float,
    grn_eps: float,
) -> list[Tensor]:
    """h, mean, rstd, norms and the result, uninitialised."""
    count, channels, dim = x.shape[0], x.shape[1], parameters[2].shape[0]
    return [
        x.new_empty(count, dim),
        *(x.new_empty(count, dtype=torch.float32) for _ in range(2)),
        x.new_empty(row_offsets.numel() - 1, dim, dtype=torch.float32),
        x.new_empty(count if rows is None else rows.numel(), channels),
    ]


@torch.library.custom_op("sparse_ops::triton_mlp", mutates_args=())
def triton_mlp(
    x: Tensor,
    parameters: list[Tensor],
    row_offsets: Tensor,
    rows: Tensor | None,
    norm_eps: float,
    grn_eps: float,
) -> list[Tensor]:
    """See :meth:`sparse_ops.backend.Backend.mlp`: what is kept, then the result."""
    kernels = _kernels("mlp")
    norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2 = parameters
    h, mean, rstd, norms, out = _mlp_outputs(x, parameters, row_offsets, rows, norm_eps, grn_eps)
    normed = torch.empty_like(x)
    if x.numel():
        tile = norm_tile(x.shape[1])
        (count, width), norm = x.shape, (norm_weight, norm_bias, normed, mean, rstd)
        grid = (-(-count // tile.rows),)
        _launch(kernels.layer_norm_kernel, grid, x, *norm, count, norm_eps, WIDTH=width, **tile.constants)
    torch.mm(normed, w1.to(x.dtype).t(), out=h)
    hidden = _Hidden(h, row_offsets)
    partial, scale, y = hidden.partial(), hidden.of_groups(), torch.empty_like(h)
    hidden.walk(kernels.gelu_energy_kernel, h, b1, row_offsets, partial)
    hidden.each_group(kernels.grn_scale_kernel, partial, gamma, norms, scale, hidden.parts, grn_eps)
    hidden.walk(kernels.grn_apply_kernel, h, b1, scale, beta, row_offsets, y)
    y = y if rows is None else y.index_select(0, rows)
    torch.addmm(b2.to(x.dtype), y, w2.to(x.dtype).t(), out=out)
    return [h, mean, rstd, norms, out]


triton_mlp.register_fake(_mlp_outputs)


@torch.library.custom_op("sparse_ops::triton_mlp_backward", mutates_args=())
def triton_mlp_backward(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    row_offsets: Tensor,
    rows: Tensor | None,
    kept: list[Tensor],
    norm_eps: float,
    grn_eps: float,
) -> list[Tensor]:
    """See :meth:`sparse_ops.backend.Backend.mlp_backward`."""
    kernels = _kernels("mlp")
    norm_weight, norm_bias, w1, b1, gamma, beta, w2, _ = parameters
    h, mean, rstd, norms = kept
    w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
    grad_h = torch.empty_like(h)
    if rows is None:
        torch.mm(grad, w2, out=grad_h)
    else:
        grad_h.zero_().index_copy_(0, rows, grad @ w2)

    hidden = _Hidden(h, row_offsets)
    product, plain = hidden.partial(), hidden.partial()
    hidden.walk(kernels.grn_backward_sums_kernel, grad_h, h, b1, row_offsets, product, plain)
    scale, pull, grad_gamma, grad_beta = (hidden.of_groups() for _ in range(4))
    hidden.each_group(
        kernels.grn_backward_scale_kernel,
        product,
        plain,
        gamma,
        norms,
        scale,
        pull,
        grad_gamma,
        grad_beta,
        hidden.parts,
        grn_eps,
    )
    y, grad_b1 = torch.empty_like(h), product
    hidden.walk(kernels.grn_backward_apply_kernel, grad_h, h, b1, scale, pull, beta, row_offsets, y, grad_b1)
    grad_w2 = grad.t() @ (y if rows is None else y.index_select(0, rows))
    del y

    grad_normed, normed = grad_h @ w1, torch.empty_like(x)
    tile = norm_tile(x.shape[1])
    programs = min(512, -(-x.shape[0] // tile.rows))
    grad_x, partial = torch.empty_like(x), x.new_empty(2, programs, x.shape[1], dtype=torch.float32)
    if programs:
        _launch(
            kernels.layer_norm_backward_kernel,
            (programs,),
            grad_normed,
            x,
            norm_weight,
            norm_bias,
            mean,
            rstd,
            grad_x,
            normed,
            partial[0],
            partial[1],
            x.shape[0],
            WIDTH=x.shape[1],
            **tile.constants,
        )
    sums = (
        partial[0].sum(0),
        partial[1].sum(0),
        grad_h.t() @ normed,
        grad_b1.sum((0, 1)),
        grad_gamma.sum(0),
        grad_beta.sum(0),
    )
    found = (*sums, grad_w2, grad.sum(0, dtype=torch.float32))
    return [grad_x, *(value.to(parameter.dtype) for value, parameter in zip(found, parameters, strict=True))]


@triton_mlp_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    row_offsets: Tensor,
    rows: Tensor | None,
    kept: list[Tensor],
    norm_eps: float,
    grn_eps: float,
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (x, *parameters)]


def _compile_stage(side: int, channels: int, kernel_size: int, device: torch.device, dtype: torch.dtype) -> None:
    """Inside of :func:`only_compiling`: everything that a block of such a stage launches; parameters are float32."""
    active = ActiveSet.full(1, (1, 1), side, device=device)
    x = torch.empty(active.num_cells, channels, device=device, dtype=dtype)
    weight = x.new_empty(channels, 1, kernel_size, kernel_size)
    convolved, summed = (active.tile_neighbours(kernel_size, tile) for tile in (TILE, WEIGHT_TILE))
    triton_depthwise(x, weight, None, convolved, min(side, TILE), False)
    triton_depthwise_weight_grad(x, x, summed, min(side, WEIGHT_TILE), kernel_size)

    def parameter(*shape: int) -> Tensor:
        return torch.empty(shape, device=device)

    dim = 4 * channels
    norm, hidden = [parameter(channels), parameter(channels)], [parameter(dim), parameter(dim), parameter(dim)]
    parameters = [*norm, parameter(dim, channels), *hidden, parameter(channels, dim), parameter(channels)]
    *kept, out = triton_mlp(x, parameters, active.row_offsets, None, 1e-6, 1e-6)
    triton_mlp_backward(out, x, parameters, active.row_offsets, None, kept, 1e-6, 1e-6)


class TritonBackend(Backend):
    """Kernels in Triton for float32, bfloat16 and float16, with sums in float32: convolution and pointwise half."""

    name = "triton"
    priority = 5

    def __init__(self) -> None:
        self._compiled: set[tuple[int, int, int, torch.device, torch.dtype]] = set()

    @property
    def summary(self) -> str:  # type: ignore[override]  # says where it runs
        return "Triton kernels for NVIDIA GPUs" + (" (interpreted, on the CPU)" if interpreting() else "")

    def unavailable_reason(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; it comes with torch for CUDA: pip install torch"
        if interpreting():
            return None
        if not torch.cuda.is_available():
            return "torch finds no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
        if torch.cuda.get_device_capability()[0] < 8:
            return f"it needs a GPU of compute capability 8.0 or newer, not {torch.cuda.get_device_name()}"
        return None

    def rejects(self, device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
        if device.type != ("cpu" if interpreting() else "cuda"):
            return f"it runs on CUDA{', here interpreted on the CPU' if interpreting() else ''}, not on {device}"
        if dtype not in DTYPES:
            return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
        if kernel_size not in KERNEL_SIZES:
            return f"kernel size {kernel_size} is not one of {KERNEL_SIZES}"
        return None

    def check(self, device: torch.device) -> str | None:
        """A small case of each kernel against the float64 oracle, with and without 16 bits."""
        from sparse_ops import testing

        case = testing.ConformanceCase("check", ("..#/#.#",), channels=16)
        mlp_case = testing.MLPCase("check", (48, 48), channels=16)
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                for dtype in (torch.float32, torch.bfloat16):
                    testing.check_conformance(self, case, dtype, device)
                    testing.check_mlp_conformance(self, mlp_case, dtype, device)
        except Exception as error:  # whatever Triton raises, it is told and another backend runs
            return f"its kernels fail their check on this device ({type(error).__name__}: {str(error)[:500]})"
        return None

    def warm_up(
        self, stages: Sequence[tuple[int, int]], kernel_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Kernels are compiled side by side: some take seconds, and a network needs about forty."""
        if interpreting() or device.type == "meta" or self.rejects(device, dtype, kernel_size) is not None:
            return
        missing = {(side, channels, kernel_size, device, dtype) for side, channels in stages} - self._compiled
        if missing:
            with only_compiling(), torch.no_grad(), torch.autocast(device.type, enabled=False):
                for stage in missing:
                    _compile_stage(*stage)
            self._compiled |= missing

    def prepare(self, active: ActiveSet, kernel_size: int) -> None:
        active.tile_neighbours(kernel_size, TILE)
        active.tile_neighbours(kernel_size, WEIGHT_TILE)

    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, *, reverse_taps: bool
    ) -> Tensor:
        neighbours = active.tile_neighbours(weight.shape[-1], TILE)
        return run(triton_depthwise, x, weight, bias, neighbours, min(active.side, TILE), reverse_taps)

    def depthwise_weight_grad(self, x: Tensor, grad: Tensor, active: ActiveSet, kernel_size: int) -> Tensor:
        neighbours = active.tile_neighbours(kernel_size, WEIGHT_TILE)
        return run(triton_depthwise_weight_grad, x, grad, neighbours, min(active.side, WEIGHT_TILE), kernel_size)

    def fuses_mlp(self, device: torch.device, dtype: torch.dtype) -> bool:
        return dtype in DTYPES and self.rejects(device, dtype, 7) is None

    mixes_dtypes = True

    def fuses_whole_mlp(self, channels: int, some_rows: bool) -> bool:
        return True

    def mlp(
        self,
        x: Tensor,
        parameters: tuple[Tensor, ...],
        row_offsets: Tensor,
        rows: Tensor | None,
        norm_eps: float,
        grn_eps: float,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        *kept, out = run(triton_mlp, x, list(parameters), row_offsets, rows, norm_eps, grn_eps)
        return out, tuple(kept)

    def mlp_backward(
        self,
        grad: Tensor,
        x: Tensor,
        parameters: tuple[Tensor, ...],
        row_offsets: Tensor,
        rows: Tensor | None,
        kept: tuple[Tensor, ...],
        norm_eps: float,
        grn_eps: float,
    ) -> list[Tensor]:
        return run(triton_mlp_backward, grad, x, list(parameters), row_offsets, rows, list(kept), norm_eps, grn_eps)


BACKEND = TritonBackend()

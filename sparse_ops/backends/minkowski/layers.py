"""Layers on MinkowskiEngine's sparse tensors: those that its releases lack, in the official FCMAE's parameter layouts.

Released versions have no depthwise convolution but one that loops over the taps, and no LayerNorm, GRN and DropPath.
Each layer here is a function of a sparse tensor and its parameters, and a module of the official name around it; code
that was written for the official FCMAE finds the modules after :func:`provide_official_names`.

MinkowskiEngine numbers the taps of a kernel with the first spatial axis fastest: tap ``x·K + y`` on (y, x).

Shape letters: N cells, C channels, D hidden channels, T taps (K² in two dimensions), G groups of GRN's norms.
Importing this module does not import MinkowskiEngine, which happens when it is asked for.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparse_ops.grid import GRN_SCOPES, GRNScope
from sparse_ops.pointwise import grn_scale

EPS = 1e-6
CHUNK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Of the neighbours that a depthwise convolution gathers at a time: on a processor, so that they stay in the cache."""

SparseTensor = Any
"""A ``MinkowskiEngine.SparseTensor``."""


def minkowski_engine() -> Any:
    """The module MinkowskiEngine, imported without its warnings.

    Its import sets ``OMP_NUM_THREADS`` for this process and its children where that is not set and there are many
    cores; torch's number of threads is put there for the time of the import instead. Raises ImportError if
    it is not installed, or does not fit the torch that is.
    """
    if "MinkowskiEngine" in sys.modules:
        return sys.modules["MinkowskiEngine"]
    given = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = given or str(torch.get_num_threads())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("MinkowskiEngine")
    finally:
        if given is None:
            del os.environ["OMP_NUM_THREADS"]


def _cached(sparse: SparseTensor, make: Any, *arguments: Any) -> Any:
    """``make(manager, key, *arguments)``, computed once for a coordinate map; lives as long as the manager does."""
    manager, key = sparse.coordinate_manager, sparse.coordinate_map_key
    tables = manager.__dict__.setdefault("_sparse_ops_tables", {})
    stride, name = key.get_key()
    entry = (make.__name__, tuple(stride), name, *arguments)
    if entry not in tables:
        tables[entry] = make(manager, key, *arguments)
    return tables[entry]


def neighbour_table(manager: Any, key: Any, kernel_size: int, dilation: int) -> Tensor:
    """``[N, T]`` int64: the row under each tap, N where there is none; from MinkowskiEngine's kernel map."""
    cells, taps = manager.size(key), kernel_size**manager.D
    pairs = manager.kernel_map(key, key, stride=1, kernel_size=kernel_size, dilation=dilation)
    table_NT = torch.full((cells, taps), cells, device=manager.get_coordinates(key).device)
    for tap, (source, target) in pairs.items():
        table_NT[target.long(), tap] = source.long()
    return table_NT


def image_index(manager: Any, key: Any) -> tuple[Tensor, int]:
    """The image of each row, ``[N]`` int64, and the number of images up to the last that has a cell."""
    image_N = manager.get_coordinates(key)[:, 0].long()
    return image_N, int(image_N.max()) + 1 if len(image_N) else 0


def _gathered(x_NC: Tensor, table_NT: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the cells, and what lies under their taps: ``[n, T, C]``, zeros where there is nothing.

    All are given in the same memory: use one before the next is taken.
    """
    (cells, channels), taps = x_NC.shape, table_NT.shape[1]
    padded = torch.cat((x_NC, x_NC.new_zeros(1, channels)))
    budget = CHUNK_BYTES["cuda" if x_NC.is_cuda else "cpu"]
    size = min(max(1, budget // max(1, taps * channels * x_NC.element_size())), cells)
    memory = x_NC.new_empty(size * taps, channels)
    for start in range(0, cells, size):
        index = table_NT[start : start + size].view(-1)
        under = torch.index_select(padded, 0, index, out=memory[: len(index)])
        yield slice(start, start + size), under.view(-1, taps, channels)


def sum_taps(x_NC: Tensor, kernel_TC: Tensor, table_NT: Tensor) -> Tensor:
    """``out[n] = Σ_t kernel[t] · x[table[n, t]]``, ``[N, C]``."""
    out = torch.empty_like(x_NC)
    for cells, under_nTC in _gathered(x_NC, table_NT):
        torch.sum(under_nTC.mul_(kernel_TC), 1, out=out[cells])
    return out


def sum_taps_backward(
    grad_NC: Tensor, x_NC: Tensor, kernel_TC: Tensor, table_NT: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`sum_taps` for ``x`` and for the kernel, None where not wanted.

    The cells are the same on both sides, so tap t from m to n is tap T-1-t from n to m: one gather of ``grad`` serves
    both gradients with the taps reversed, and neither scatters.
    """
    grad_x = torch.empty_like(x_NC) if wanted[0] else None
    grad_kernel = torch.zeros_like(kernel_TC) if wanted[1] else None
    reversed_TC = kernel_TC.flip(0)
    product = None
    for cells, under_nTC in _gathered(grad_NC, table_NT):
        if grad_kernel is not None:
            product = torch.empty_like(under_nTC) if product is None else product[: len(under_nTC)]
            grad_kernel += torch.mul(under_nTC, x_NC[cells, None], out=product).sum(0)
        if grad_x is not None:
            torch.sum(under_nTC.mul_(reversed_TC), 1, out=grad_x[cells])
    return grad_x, None if grad_kernel is None else grad_kernel.flip(0)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel, table)
        return sum_taps(x, kernel, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel, table = ctx.saved_tensors
        return *sum_taps_backward(grad.contiguous(), x, kernel, table, ctx.needs_input_grad[:2]), None


def with_features(sparse: SparseTensor, features: Tensor, key: Any = None) -> SparseTensor:
    """A sparse tensor on the coordinates of another, or on the map ``key`` of the same manager."""
    key = sparse.coordinate_map_key if key is None else key
    return type(sparse)(features, coordinate_map_key=key, coordinate_manager=sparse.coordinate_manager)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError unless MinkowskiEngine computes in ``dtype``."""
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"MinkowskiEngine computes in float32 and float64, got {dtype}; call .float() on the features")


def depthwise_conv(
    sparse: SparseTensor, kernel: Tensor, bias: Tensor | None, kernel_size: int, dilation: int = 1
) -> SparseTensor:
    """Depthwise convolution of stride 1 over the cells that are there.

    The kernel map is computed once for a coordinate map and kernel size, and kept with the coordinate manager.

    Args:
        sparse: features ``[N, C]``, float32 or float64.
        kernel: ``[T, C]`` in MinkowskiEngine's tap order; K is odd.
        bias: ``[1, C]``, ``[C]`` or None.

    Raises:
        TypeError: if the features are of another dtype.
        ValueError: if the channels or the number of taps do not fit.
    """
    features = sparse.F
    check_dtype(features.dtype)
    expected = (kernel_size**sparse.D, features.shape[1])
    if tuple(kernel.shape) != expected:
        raise ValueError(f"expected a kernel {list(expected)} for these features, got {list(kernel.shape)}")
    table = _cached(sparse, neighbour_table, kernel_size, dilation)
    out = _Depthwise.apply(features.contiguous(), kernel.contiguous(), table)
    return with_features(sparse, out if bias is None else out + bias)


def strided_conv(sparse: SparseTensor, kernel: Tensor, bias: Tensor | None, stride: int, out_key: Any) -> SparseTensor:
    """MinkowskiEngine's own convolution with kernel size and stride ``stride``, as ``MinkowskiConvolution`` runs it.

    Args:
        sparse: features ``[N, Cin]``, float32 or float64.
        kernel: ``[stride², Cin, Cout]`` in MinkowskiEngine's tap order.
        bias: ``[1, Cout]``, ``[Cout]`` or None.
        out_key: the coordinate map of the result.
    """
    engine, manager = minkowski_engine(), sparse.coordinate_manager
    check_dtype(sparse.dtype)
    generator = engine.KernelGenerator(kernel_size=stride, stride=stride, dilation=1, dimension=manager.D)
    mode = importlib.import_module("MinkowskiEngineBackend._C").ConvolutionMode.DEFAULT
    features = engine.MinkowskiConvolutionFunction.apply(
        sparse.F, kernel.contiguous(), generator, mode, sparse.coordinate_map_key, out_key, manager
    )
    return with_features(sparse, features if bias is None else features + bias, out_key)


def grn(sparse: SparseTensor, gamma: Tensor, beta: Tensor, scope: GRNScope, eps: float = EPS) -> SparseTensor:
    """Global response normalisation (ConvNeXt V2, eq. 1-3, with the residual); a norm of 0 has gradient 0.

    Args:
        sparse: features ``[N, D]``.
        gamma, beta: ``[D]`` or ``[1, D]``.
        scope: norms over the cells of each image, or of the whole batch as in the official sparse pre-training.
    """
    x_ND = sparse.F
    if scope == "batch":
        factor = grn_scale(x_ND.square().sum(0, keepdim=True), gamma.flatten(), eps)
    else:
        image_N, images = _cached(sparse, image_index)
        energy_GD = x_ND.new_zeros(images, x_ND.shape[1]).index_add(0, image_N, x_ND.square())
        factor = grn_scale(energy_GD, gamma.flatten(), eps).index_select(0, image_N)
    return with_features(sparse, x_ND * factor + beta.flatten())


class MinkowskiDepthwiseConvolution(nn.Module):
    """Depthwise convolution on a sparse tensor of ``dimension`` spatial dimensions, 2 for images.

    Parameters: ``kernel`` ``[T, C]`` in MinkowskiEngine's tap order, T = ``K ** dimension``, and ``bias`` ``[1, C]``,
    as in official checkpoints. ``stride`` is there for callers that name it. Raises ValueError for a stride other than
    1, an even kernel, or no dimension.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int = -1,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = False,
        dimension: int = -1,
    ) -> None:
        super().__init__()
        if stride != 1:
            raise ValueError(
                f"the depthwise convolution has stride 1, got {stride}; use MinkowskiConvolution for others"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if dimension < 1:
            raise ValueError(f"dimension must be given, 2 for images; got {dimension}")
        self.in_channels, self.kernel_size = in_channels, kernel_size
        self.dilation, self.dimension = dilation, dimension
        self.kernel = nn.Parameter(torch.empty(kernel_size**dimension, in_channels))
        self.bias = nn.Parameter(torch.zeros(1, in_channels)) if bias else None
        nn.init.trunc_normal_(self.kernel, std=0.02)

    def forward(self, sparse: SparseTensor) -> SparseTensor:
        """Features ``[N, C]`` on the same coordinates."""
        if self.dimension != sparse.D:
            raise ValueError(f"expected {self.dimension} spatial dimensions, the sparse tensor has {sparse.D}")
        return depthwise_conv(sparse, self.kernel, self.bias, self.kernel_size, self.dilation)

    def extra_repr(self) -> str:
        return f"in={self.in_channels}, kernel_size={self.kernel_size}, dilation={self.dilation}"


class MinkowskiLayerNorm(nn.Module):
    """LayerNorm over the channels of a sparse tensor; parameters ``ln.weight`` and ``ln.bias`` ``[C]``."""

    def __init__(self, normalized_shape: int, eps: float = EPS) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(normalized_shape, eps=eps)

    def forward(self, sparse: SparseTensor) -> SparseTensor:
        return with_features(sparse, self.ln(sparse.F))


class MinkowskiGRN(nn.Module):
    """:func:`grn` with the parameters ``gamma`` and ``beta`` ``[1, D]``; ValueError unless the scope is "batch" or
    "image"."""

    def __init__(self, dim: int, scope: GRNScope = "batch") -> None:
        super().__init__()
        if scope not in GRN_SCOPES:
            raise ValueError(f"scope must be one of {GRN_SCOPES}, got {scope!r}")
        self.scope: GRNScope = scope
        self.gamma = nn.Parameter(torch.zeros(1, dim))
        self.beta = nn.Parameter(torch.zeros(1, dim))

    def forward(self, sparse: SparseTensor) -> SparseTensor:
        return grn(sparse, self.gamma, self.beta, self.scope)

    def extra_repr(self) -> str:
        return f"dim={self.gamma.shape[1]}, scope={self.scope}"


class MinkowskiDropPath(nn.Module):
    """Stochastic depth, drawn per image from torch's generator, in training mode only.

    ``scale_by_keep`` divides by the probability of keeping the branch of an image, so that the expectation is kept.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, sparse: SparseTensor) -> SparseTensor:
        if self.drop_prob == 0.0 or not self.training:
            return sparse
        image_N, images = _cached(sparse, image_index)
        keep = 1 - self.drop_prob
        factor = sparse.F.new_empty(images, 1).bernoulli_(keep)
        if self.scale_by_keep and keep > 0:
            factor /= keep
        return with_features(sparse, sparse.F * factor.index_select(0, image_N))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


OFFICIAL_LAYERS = (MinkowskiDepthwiseConvolution, MinkowskiLayerNorm, MinkowskiGRN, MinkowskiDropPath)


def provide_official_names() -> tuple[str, ...]:
    """Put the layers into the module MinkowskiEngine, so that code written for the official FCMAE finds them there.

    A build that has a layer of that name keeps its own. Returns the names that were added; raises ImportError as
    :func:`minkowski_engine`.
    """
    engine = minkowski_engine()
    added = [layer for layer in OFFICIAL_LAYERS if not hasattr(engine, layer.__name__)]
    for layer in added:
        setattr(engine, layer.__name__, layer)
    return tuple(layer.__name__ for layer in added)

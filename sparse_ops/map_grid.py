"""The dense grid of a network on a processor: a backend's kernels for whole maps in place of torch's operators.

Only where they do what the layers would do, and nothing watches: :func:`torch_reason` and :class:`MapGrid` say when.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sparse_ops.backend import Backend, MLPCall
from sparse_ops.checks import keeps_size
from sparse_ops.functional import _MLP
from sparse_ops.grid import MLP, DenseGrid, GRNScope
from sparse_ops.layers import has_hooks, mlp_weights
from sparse_ops.map_kernels import MapKernels
from sparse_ops.pointwise import MLPWeights, autocast_dtype, grn_scale
from sparse_ops.registry import get_backend, registry
from sparse_ops.workspace import Workspace

TORCH = "torch"
"""In place of a backend's name: torch's own operators."""

logger = logging.getLogger(__name__)


@cache
def map_backend(name: str) -> Backend | None:
    """The backend of that name; of ``auto`` the best one available that has kernels for whole maps; None for torch.

    Raises:
        ValueError: if no backend has that name, or it has no such kernels.
        BackendUnavailableError: if it is named and cannot run here.
    """
    able = {name: backend for name, backend in registry().items() if backend.maps is not None}
    if name == TORCH:
        return None
    if name != "auto":
        if name not in able:
            choices = ", ".join(("auto", TORCH, *able))
            raise ValueError(f"backend of a dense network must be one of {choices}, got {name!r}")
        return get_backend(name)
    for backend in able.values():
        reason = backend.unavailable_reason()
        if reason is None:
            logger.info("dense networks: chose %s for processors", backend.name)
            return backend
        logger.warning("dense networks: the faster %s is not available: %s", backend.name, reason)
    return None


def torch_reason(name: str, device: torch.device, dtype: torch.dtype, kernel_size: int, training: bool) -> str | None:
    """Why a dense network would run on torch's operators, or None if it runs on a backend's kernels.

    Args:
        name: of the backend, as :func:`map_backend` takes it.
        device, dtype, kernel_size: of the network.
        training: whether gradients are asked for.
    """
    backend = map_backend(name)
    if backend is None or backend.maps is None:
        return "torch's operators were asked for" if name == TORCH else "no backend with kernels for whole maps is here"
    reason = backend.maps.rejects(device, dtype, kernel_size)
    if reason is None and training and dtype not in (torch.float32, torch.float64):
        return f"{dtype} is served in evaluation only"
    return reason


def runs_on(name: str, device: torch.device, dtype: torch.dtype, kernel_size: int, training: bool) -> str:
    """The backend's name, or ``torch: `` and why; arguments as :func:`torch_reason`."""
    reason = torch_reason(name, device, dtype, kernel_size, training)
    backend = map_backend(name)
    return f"{TORCH}: {reason}" if reason is not None or backend is None else backend.name


def _watched(images: Tensor) -> bool:
    """Whether something besides the layers' own arithmetic is to see the operators: a trace, a transform, a mode."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not _own(images):
        return True
    return (
        autocast_dtype(images.device) is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _get_current_dispatch_mode() is not None
        or any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
        or nn_module._has_any_global_hook()
    )


def _own(*tensors: Any) -> bool:
    """Whether they are ordinary tensors in memory, of one device and dtype."""
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and (tensor.device, tensor.dtype) == (tensors[0].device, tensors[0].dtype)
        for tensor in tensors
    )


def _recorded(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow what is computed of them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _replaced(layer: nn.Module) -> bool:
    """Whether calling the layer does more, or something else, than its class does."""
    return has_hooks(layer) or "forward" in vars(layer)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, maps: MapKernels) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.maps = maps
        return maps.depthwise(x, weight, bias, reverse_taps=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            return *_again(_plain_depthwise, ctx, ctx.saved_tensors, grad), None
        return _Depthwise.first_order(ctx, grad)

    @staticmethod
    @once_differentiable
    def first_order(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.maps.depthwise(grad, weight, None, reverse_taps=True)
        if any(ctx.needs_input_grad[1:3]):
            grad_weight, grad_bias = ctx.maps.depthwise_weight_grad(x, grad, weight.shape[-1])
        return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None


class _TwiceMLP(_MLP):
    """The fused pointwise half, whose gradient can be differentiated too: by torch's operators then."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _MLP.backward(ctx, grad)
        x, row_offsets, _, *weights = ctx.saved_tensors[:11]

        def plain(x: Tensor, *weights: Tensor) -> Tensor:
            return _plain_mlp(x, MLPWeights(*weights), row_offsets.numel() - 1, ctx.eps)

        needed = ctx.needs_input_grad[3:4] + ctx.needs_input_grad[6:]
        grad_x, *grads = _again(plain, ctx, (x, *weights), grad, needed)
        return None, None, None, grad_x, None, None, *grads


def _again(function: Any, ctx: Any, tensors: Any, grad: Tensor, needed: Any = None) -> list[Tensor | None]:
    """Gradients of ``function`` of the saved tensors, with a graph of their own."""
    needed = ctx.needs_input_grad if needed is None else needed
    # Views, so that a tensor that was made from another one is not differentiated through to it.
    views = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    wanted = [view for view, need in zip(views, needed, strict=False) if need and view is not None]
    found = iter(torch.autograd.grad(function(*views), wanted, grad, create_graph=True))
    pairs = zip(views, needed, strict=False)
    return [next(found) if need and view is not None else None for view, need in pairs]


def _plain_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return out.permute(0, 2, 3, 1)


def _plain_mlp(x: Tensor, weights: MLPWeights, groups: int, eps: tuple[float, float]) -> Tensor:
    """The pointwise half of rows ``[N, C]``, of which each of the groups has as many."""
    norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2 = weights
    h = F.gelu(F.linear(F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, eps[0]), w1, b1))
    h = h.view(groups, -1, h.shape[1])
    scale = grn_scale(h.square().sum(1), gamma, eps[1])
    return F.linear((h * scale[:, None] + beta).flatten(0, 1), w2, b2)


class MapGrid(DenseGrid):
    """Every cell of ``[B, C, H, W]``, with a backend's kernels for the depthwise convolution and the pointwise half.

    A layer is called as on any dense grid where it has hooks, where its class is not torch's own or computes otherwise,
    and where its tensors are not what the kernels serve. A network that is traced, compiled, transformed or watched by
    a mode, or runs under autocast, gets an ordinary dense grid at its start (:meth:`native`).

    Args:
        batch_size: images.
        backend: a backend's name, ``auto``, or ``torch`` for torch's operators; see :func:`map_backend`.
        grn_scope: see :class:`~sparse_ops.grid.Grid`.
    """

    def __init__(self, batch_size: int, backend: str = "auto", grn_scope: GRNScope = "image") -> None:
        super().__init__(batch_size, grn_scope)
        self._choice = backend
        self._workspace = Workspace()
        self._offsets: dict[int, Tensor] = {}

    def native(self, images: Tensor, kernel_size: int) -> DenseGrid:
        plain = DenseGrid(self.batch_size, self.grn_scope)
        if _watched(images):
            return plain
        backend = map_backend(self._choice)
        if backend is None or backend.maps is None:
            return plain
        self._backend, self._maps = backend, backend.maps
        return self

    def depthwise(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        if type(layer).forward is not nn.Conv2d.forward or _replaced(layer):
            return layer(x)
        weight, bias = layer.weight, layer.bias
        tensors = (x, weight) if bias is None else (x, weight, bias)
        size, channels = weight.shape[-1], x.shape[1]
        usual = weight.shape == (channels, 1, size, size) and keeps_size(layer, weight)
        if not usual or not self._serves(size, *tensors):
            return layer(x)
        cells, kept = self.cells(x).contiguous(), weight.contiguous()
        if _recorded(*tensors):
            return self.features(_Depthwise.apply(cells, kept, bias, self._maps))
        return self.features(self._maps.depthwise(cells, kept, bias, reverse_taps=False))

    def residual(self, x: Tensor, dwconv: nn.Conv2d, mlp: MLP, drop_path: Any, rows: Tensor | None = None) -> Tensor:
        h = self.depthwise(dwconv, x)
        alone = rows is None and drop_path.idle and not _replaced(drop_path) and h.shape == x.shape and _own(h, x)
        weights = self._served_weights(h, mlp) if alone and not _recorded(h, x) else None
        if weights is None or _recorded(*weights):
            return self.take(x, rows) + drop_path(self.mlp(h, mlp, rows), self)
        cells = self.cells(x).contiguous()
        return self.features(
            self._backend.mlp_result(self._call(h, weights, mlp), cells.flatten(0, 2)).view(cells.shape)
        )

    def mlp(self, x: Tensor, layers: MLP, rows: Tensor | None = None) -> Tensor:
        weights = None if rows is not None else self._served_weights(x, layers)
        if weights is None:
            return super().mlp(x, layers, rows)
        call = self._call(x, weights, layers)
        if _recorded(x, *weights):
            tensors = call.x, call.row_offsets, None, *call.weights
            out = _TwiceMLP.apply(self._backend, call.eps, self._workspace, *tensors)
        else:
            out = self._backend.mlp_result(call)
        return self.features(out.view(self.cells(x).shape))

    def _served_weights(self, x: Tensor, layers: MLP) -> MLPWeights | None:
        """What the layers compute with, if a kernel does so in their place."""
        weights = mlp_weights(layers)
        if weights is None or not self._serves(7, x, *weights):
            return None
        shapes = MLPWeights.shapes(x.shape[1], weights.w1.shape[0])
        return weights if [tuple(tensor.shape) for tensor in weights] == shapes and self._fuses(x, weights) else None

    def _call(self, x: Tensor, weights: MLPWeights, layers: MLP) -> MLPCall:
        """The pointwise half of ``x`` in one kernel."""
        cells, kept = self.cells(x).contiguous(), MLPWeights(*(tensor.contiguous() for tensor in weights))
        eps = layers.norm.eps, layers.grn.eps
        return MLPCall(cells.flatten(0, 2), self._row_offsets(cells), None, kept, eps, self._workspace)

    def _fuses(self, x: Tensor, weights: MLPWeights) -> bool:
        return self._backend.fuses_mlp(x.device, x.dtype, weights.w1.dtype)

    def _serves(self, kernel_size: int, x: Tensor, *weights: Any) -> bool:
        if not _own(x, *weights):
            return False
        return torch_reason(self._choice, x.device, x.dtype, kernel_size, _recorded(x, *weights)) is None

    def _row_offsets(self, cells: Tensor) -> Tensor:
        """Of the images, or of all of them together, in the rows of a map."""
        count = cells.shape[1] * cells.shape[2]
        if count not in self._offsets:
            images = torch.arange(self.batch_size + 1, device=cells.device) * count
            self._offsets[count] = images if self.grn_scope == "image" else images[:: max(self.batch_size, 1)]
        return self._offsets[count].contiguous()

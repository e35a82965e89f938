"""The compiled CPU backend: C++ kernels that work patch by patch with a halo, vectorised over channels.

The library in ``csrc`` knows neither torch nor Python (it is called through ``ctypes`` with plain pointers), so it
keeps working when either is upgraded. The instruction set is chosen when it is loaded, by what the processor has;
``SPARSE_OPS_CPU=baseline|avx2|avx512`` asks for a lower one.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparse_ops.active_set import ActiveSet
from sparse_ops.backend import Backend
from sparse_ops.backends._operators import run

INTERFACE_VERSION = 4
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
KERNEL_SIZES = (3, 5, 7)
#: Up to this width the whole pointwise half of a block is one kernel: its weights stay in a core's own cache.
MLP_MAX_CHANNELS = 192
MLP_CHANNELS_MULTIPLE = 4
_MLP_PARAMETERS = ("norm_weight", "norm_bias", "w1", "b1", "gamma", "beta", "w2", "b2")
_MLP_OUTPUTS = ("h", "mean", "rstd", "norms", "out")
_REMEDY = (
    "install a C++ compiler (Debian: apt install g++; conda: conda install -c conda-forge gxx) "
    "and reinstall: pip install --force-reinstall --no-deps ."
)


class _DepthwiseArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "other", "bias", "neighbours", "out")),
        *((name, ctypes.c_int64) for name in ("patches", "channels")),
        *((name, ctypes.c_int) for name in ("side", "kernel", "reverse_taps", "threads")),
    )


class _GeluGrnArgs(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in [
                "h",
                "bias",
                "gamma",
                "beta",
                "offsets",
                "norms",
                "y",
                "grad",
                "grad_gamma",
                "grad_beta",
                "grad_bias",
            ]
        ),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("groups", "dim")),
        ("threads", ctypes.c_int),
    )


class _LayerNormArgs(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ["grad", "x", "mean", "rstd", "weight", "bias", "normed", "grad_x", "grad_weight", "grad_bias"]
        ),
        *((name, ctypes.c_int64) for name in ("rows", "channels")),
        ("threads", ctypes.c_int),
    )


class _MLPArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ["x", *_MLP_PARAMETERS, "offsets", *_MLP_OUTPUTS]),
        *((name, ctypes.c_void_p) for name in ["grad", "grad_x", *(f"grad_{name}" for name in _MLP_PARAMETERS)]),
        *((name, ctypes.c_double) for name in ("norm_eps", "grn_eps")),
        *((name, ctypes.c_int64) for name in ("groups", "channels", "dim")),
        ("threads", ctypes.c_int),
    )


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    found = sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not found:
        return None, f"its C++ extension was not compiled when the package was installed; {_REMEDY}"
    try:
        library = ctypes.CDLL(os.fspath(found[0]))
        version = library.sparse_ops_interface_version()
    except (OSError, AttributeError) as error:
        return None, f"its C++ extension {found[0].name} cannot be loaded ({error}); {_REMEDY}"
    if version != INTERFACE_VERSION:
        return None, (
            f"its C++ extension has interface version {version}, this package needs {INTERFACE_VERSION}; "
            "reinstall: pip install --force-reinstall --no-deps ."
        )
    library.sparse_ops_instruction_set.restype = ctypes.c_char_p
    library.sparse_ops_threads.restype = ctypes.c_char_p
    return library, None


def _call(function: str, args: ctypes.Structure, dtype: torch.dtype) -> None:
    library, _ = _load()
    assert library is not None
    status = getattr(library, function)(ctypes.byref(args), DTYPES[dtype])
    assert status == 0, f"{function} has no kernel for {dtype}"


def _pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


@torch.library.custom_op("sparse_ops::cpu_depthwise", mutates_args=(), device_types="cpu")
def cpu_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, side: int, reverse_taps: bool
) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.depthwise`; ``neighbours`` is the patch table ``[P, (2R + 1)²]``."""
    out = torch.empty_like(x)
    args = _DepthwiseArgs(
        x=_pointer(x),
        other=_pointer(weight),
        bias=_pointer(bias),
        neighbours=_pointer(neighbours),
        out=_pointer(out),
        patches=neighbours.shape[0],
        channels=x.shape[1],
        side=side,
        kernel=weight.shape[-1],
        reverse_taps=reverse_taps,
        threads=torch.get_num_threads(),
    )
    _call("sparse_ops_depthwise", args, x.dtype)
    return out


@cpu_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, side: int, reverse_taps: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("sparse_ops::cpu_depthwise_weight_grad", mutates_args=(), device_types="cpu")
def cpu_depthwise_weight_grad(x: Tensor, grad: Tensor, neighbours: Tensor, side: int, kernel_size: int) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.depthwise_weight_grad`."""
    out = x.new_empty(x.shape[1], 1, kernel_size, kernel_size)
    args = _DepthwiseArgs(
        x=_pointer(x),
        other=_pointer(grad),
        neighbours=_pointer(neighbours),
        out=_pointer(out),
        patches=neighbours.shape[0],
        channels=x.shape[1],
        side=side,
        kernel=kernel_size,
        threads=torch.get_num_threads(),
    )
    _call("sparse_ops_depthwise_weight_grad", args, x.dtype)
    return out


@cpu_depthwise_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, neighbours: Tensor, side: int, kernel_size: int) -> Tensor:
    return x.new_empty(x.shape[1], 1, kernel_size, kernel_size)


@torch.library.custom_op("sparse_ops::cpu_gelu_grn", mutates_args=("out",), device_types="cpu")
def cpu_gelu_grn(
    h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, row_offsets: Tensor, eps: float, out: Tensor
) -> Tensor:
    """See :meth:`sparse_ops.backend.Backend.gelu_grn`."""
    groups = row_offsets.numel() - 1
    norms = h.new_empty(groups, h.shape[1])
    args = _GeluGrnArgs(
        h=_pointer(h),
        bias=_pointer(bias),
        gamma=_pointer(gamma),
        beta=_pointer(beta),
        offsets=_pointer(row_offsets),
        norms=_pointer(norms),
        y=_pointer(out),
        eps=eps,
        groups=groups,
        dim=h.shape[1],
        threads=torch.get_num_threads(),
    )
    _call("sparse_ops_gelu_grn", args, h.dtype)
    return norms


@cpu_gelu_grn.register_fake
def _(h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, row_offsets: Tensor, eps: float, out: Tensor) -> Tensor:
    return h.new_empty(row_offsets.numel() - 1, h.shape[1])


@torch.library.custom_op("sparse_ops::cpu_gelu_grn_backward", mutates_args=("grad", "out"), device_types="cpu")
def cpu_gelu_grn_backward(
    grad: Tensor,
    h: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    norms: Tensor,
    row_offsets: Tensor,
    eps: float,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :meth:`sparse_ops.backend.Backend.gelu_grn_backward`; ``grad`` becomes the gradient for ``h``."""
    grad_gamma, grad_beta, grad_bias = torch.empty_like(gamma), torch.empty_like(beta), torch.empty_like(beta)
    args = _GeluGrnArgs(
        h=_pointer(h),
        bias=_pointer(bias),
        gamma=_pointer(gamma),
        beta=_pointer(beta),
        offsets=_pointer(row_offsets),
        norms=_pointer(norms),
        y=_pointer(out),
        grad=_pointer(grad),
        grad_gamma=_pointer(grad_gamma),
        grad_beta=_pointer(grad_beta),
        grad_bias=_pointer(grad_bias),
        eps=eps,
        groups=row_offsets.numel() - 1,
        dim=h.shape[1],
        threads=torch.get_num_threads(),
    )
    _call("sparse_ops_gelu_grn_backward", args, h.dtype)
    return grad_gamma, grad_beta, grad_bias


@cpu_gelu_grn_backward.register_fake
def _(
    grad: Tensor,
    h: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    norms: Tensor,
    row_offsets: Tensor,
    eps: float,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gamma), torch.empty_like(beta), torch.empty_like(beta)


@torch.library.custom_op("sparse_ops::cpu_layer_norm_backward", mutates_args=("out",), device_types="cpu")
def cpu_layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :meth:`sparse_ops.backend.Backend.layer_norm_backward`."""
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    args = _LayerNormArgs(
        grad=_pointer(grad),
        x=_pointer(x),
        mean=_pointer(mean),
        rstd=_pointer(rstd),
        weight=_pointer(weight),
        bias=_pointer(bias),
        normed=_pointer(out),
        grad_x=_pointer(grad_x),
        grad_weight=_pointer(grad_weight),
        grad_bias=_pointer(grad_bias),
        rows=x.shape[0],
        channels=x.shape[1],
        threads=torch.get_num_threads(),
    )
    _call("sparse_ops_layer_norm_backward", args, x.dtype)
    return grad_x, grad_weight, grad_bias


@cpu_layer_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _mlp_args(
    x: Tensor, parameters: list[Tensor], row_offsets: Tensor, norm_eps: float, grn_eps: float, **tensors: Tensor
) -> _MLPArgs:
    return _MLPArgs(
        x=_pointer(x),
        **{name: _pointer(value) for name, value in zip(_MLP_PARAMETERS, parameters, strict=True)},
        offsets=_pointer(row_offsets),
        **{name: _pointer(value) for name, value in tensors.items()},
        norm_eps=norm_eps,
        grn_eps=grn_eps,
        groups=row_offsets.numel() - 1,
        channels=x.shape[1],
        dim=parameters[2].shape[0],
        threads=torch.get_num_threads(),
    )


def _mlp_outputs(
    x: Tensor, parameters: list[Tensor], row_offsets: Tensor, norm_eps: float, grn_eps: float
) -> list[Tensor]:
    """Memory for what is kept and for the result, in the order of ``_MLP_OUTPUTS``."""
    rows, dim = x.shape[0], parameters[2].shape[0]
    shapes = ((rows, dim), (rows, 1), (rows, 1), (row_offsets.numel() - 1, dim))
    return [*(x.new_empty(shape) for shape in shapes), torch.empty_like(x)]


@torch.library.custom_op("sparse_ops::cpu_mlp", mutates_args=(), device_types="cpu")
def cpu_mlp(x: Tensor, parameters: list[Tensor], row_offsets: Tensor, norm_eps: float, grn_eps: float) -> list[Tensor]:
    """See :meth:`sparse_ops.backend.Backend.mlp`: what is kept, then the result."""
    outputs = _mlp_outputs(x, parameters, row_offsets, norm_eps, grn_eps)
    named = dict(zip(_MLP_OUTPUTS, outputs, strict=True))
    _call("sparse_ops_mlp", _mlp_args(x, parameters, row_offsets, norm_eps, grn_eps, **named), x.dtype)
    return outputs


cpu_mlp.register_fake(_mlp_outputs)


@torch.library.custom_op("sparse_ops::cpu_mlp_backward", mutates_args=(), device_types="cpu")
def cpu_mlp_backward(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    row_offsets: Tensor,
    kept: list[Tensor],
    norm_eps: float,
    grn_eps: float,
) -> list[Tensor]:
    """See :meth:`sparse_ops.backend.Backend.mlp_backward`."""
    grads = [torch.empty_like(tensor) for tensor in (x, *parameters)]
    named = {f"grad_{name}": value for name, value in zip(("x", *_MLP_PARAMETERS), grads, strict=True)}
    named |= zip(_MLP_OUTPUTS[:-1], kept, strict=True)
    args = _mlp_args(x, parameters, row_offsets, norm_eps, grn_eps, grad=grad, **named)
    _call("sparse_ops_mlp_backward", args, x.dtype)
    return grads


@cpu_mlp_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    row_offsets: Tensor,
    kept: list[Tensor],
    norm_eps: float,
    grn_eps: float,
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (x, *parameters)]


class CPUBackend(Backend):
    """Patch-and-halo kernels in C++ for float32, float64 and bfloat16 (accumulated in float32)."""

    name = "cpu"
    priority = 10

    @property
    def summary(self) -> str:  # type: ignore[override]  # says what was found on this machine
        library, _ = _load()
        if library is None:
            return "compiled C++ for processors"
        chosen = library.sparse_ops_instruction_set().decode()
        return f"compiled C++ ({chosen}; threads: {library.sparse_ops_threads().decode()})"

    def unavailable_reason(self) -> str | None:
        return _load()[1]

    def rejects(self, device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device}"
        if dtype not in DTYPES:
            return f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"
        if kernel_size not in KERNEL_SIZES:
            return f"kernel size {kernel_size} is not one of {KERNEL_SIZES}"
        return None

    def prepare(self, active: ActiveSet, kernel_size: int) -> None:
        active.patch_neighbours(kernel_size)

    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, *, reverse_taps: bool
    ) -> Tensor:
        neighbours = active.patch_neighbours(weight.shape[-1])
        return run(cpu_depthwise, x, weight, bias, neighbours, active.side, reverse_taps)

    def depthwise_weight_grad(self, x: Tensor, grad: Tensor, active: ActiveSet, kernel_size: int) -> Tensor:
        return run(cpu_depthwise_weight_grad, x, grad, active.patch_neighbours(kernel_size), active.side, kernel_size)

    def fuses_mlp(self, device: torch.device, dtype: torch.dtype) -> bool:
        return device.type == "cpu" and dtype in (torch.float32, torch.float64)

    def gelu_grn(
        self, h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, row_offsets: Tensor, eps: float, out: Tensor
    ) -> Tensor:
        return run(cpu_gelu_grn, h, bias, gamma, beta, row_offsets, eps, out)

    def gelu_grn_backward(
        self,
        grad: Tensor,
        h: Tensor,
        bias: Tensor,
        gamma: Tensor,
        beta: Tensor,
        norms: Tensor,
        row_offsets: Tensor,
        eps: float,
        out: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return run(cpu_gelu_grn_backward, grad, h, bias, gamma, beta, norms, row_offsets, eps, out)

    def layer_norm_backward(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return run(cpu_layer_norm_backward, grad, x, mean, rstd, weight, bias, out)

    def fuses_whole_mlp(self, channels: int, some_rows: bool) -> bool:
        return not some_rows and channels <= MLP_MAX_CHANNELS and channels % MLP_CHANNELS_MULTIPLE == 0

    def mlp(
        self,
        x: Tensor,
        parameters: tuple[Tensor, ...],
        row_offsets: Tensor,
        rows: Tensor | None,
        norm_eps: float,
        grn_eps: float,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        *kept, out = run(cpu_mlp, x, list(parameters), row_offsets, norm_eps, grn_eps)
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
        return run(cpu_mlp_backward, grad, x, list(parameters), row_offsets, list(kept), norm_eps, grn_eps)


BACKEND = CPUBackend()

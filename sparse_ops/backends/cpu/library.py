"""The compiled library: finding it, its structures of arguments, calling it.

``SPARSE_OPS_CPU_LIBRARY`` names another build of it than the one beside this file: that of ``make sanitize``.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

INTERFACE_VERSION = 4
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
MLP_PARAMETERS = ("norm_weight", "norm_bias", "w1", "b1", "gamma", "beta", "w2", "b2")
MLP_OUTPUTS = ("h", "mean", "rstd", "norms", "out")

_REMEDY = (
    "install a C++ compiler (Debian: apt install g++; conda: conda install -c conda-forge gxx) "
    "and reinstall: pip install --force-reinstall --no-deps ."
)


class DepthwiseArgs(ctypes.Structure):
    """Arguments of the convolution and its weight gradient; meanings are in csrc/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "other", "bias", "neighbours", "out")),
        *((name, ctypes.c_int64) for name in ("patches", "channels")),
        *((name, ctypes.c_int) for name in ("side", "kernel", "reverse_taps", "threads")),
    )


class GeluGrnArgs(ctypes.Structure):
    """Arguments of GELU with GRN, both ways."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("h", "bias", "gamma", "beta", "offsets", "norms", "y", "grad")),
        *((name, ctypes.c_void_p) for name in ("grad_gamma", "grad_beta", "grad_bias")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("groups", "dim")),
        ("threads", ctypes.c_int),
    )


class LayerNormArgs(ctypes.Structure):
    """Arguments of LayerNorm's backward pass."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ["grad", "x", "mean", "rstd", "weight", "bias", "normed", "grad_x", "grad_weight", "grad_bias"]
        ),
        *((name, ctypes.c_int64) for name in ("rows", "channels")),
        ("threads", ctypes.c_int),
    )


class MLPArgs(ctypes.Structure):
    """Arguments of the pointwise half of a block, both ways."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ["x", *MLP_PARAMETERS, "offsets", *MLP_OUTPUTS]),
        *((name, ctypes.c_void_p) for name in ["grad", "grad_x", *(f"grad_{name}" for name in MLP_PARAMETERS)]),
        *((name, ctypes.c_double) for name in ("norm_eps", "grn_eps")),
        *((name, ctypes.c_int64) for name in ("groups", "channels", "dim")),
        ("threads", ctypes.c_int),
    )


@cache
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    named = os.environ.get("SPARSE_OPS_CPU_LIBRARY")
    found = [Path(named)] if named else sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not found:
        return None, f"its C++ extension was not compiled when the package was installed; {_REMEDY}"
    try:
        library = ctypes.CDLL(os.fspath(found[0]))
        version = library.sparse_ops_interface_version()
    except (OSError, AttributeError) as error:
        remedy = "unset SPARSE_OPS_CPU_LIBRARY, or run make sanitize, which sets it" if named else _REMEDY
        return None, f"its C++ extension {found[0].name} cannot be loaded ({error}); {remedy}"
    if version != INTERFACE_VERSION:
        return None, (
            f"its C++ extension has interface version {version}, this package needs {INTERFACE_VERSION}; "
            "reinstall: pip install --force-reinstall --no-deps ."
        )
    library.sparse_ops_instruction_set.restype = ctypes.c_char_p
    library.sparse_ops_threads.restype = ctypes.c_char_p
    return library, None


def call(function: str, args: ctypes.Structure, dtype: torch.dtype) -> None:
    """Call the library's function of that name for tensors of ``dtype``."""
    library, _ = load()
    assert library is not None
    status = getattr(library, function)(ctypes.byref(args), DTYPES[dtype])
    assert status == 0, f"{function} has no kernel for {dtype}"


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous tensor's numbers."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()

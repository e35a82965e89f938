"""The compiled library: finding it, its functions and their structures of arguments, calling them.

``SPARSE_OPS_CPU_LIBRARY`` names another build of it than the one beside this file: that of ``make sanitize``.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_ops.pointwise import MLPWeights

INTERFACE_VERSION = 6
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
MLP_PARAMETERS = MLPWeights._fields
MLP_OUTPUTS = ("h", "mean", "rstd", "norms", "out")
MLP_GRADS = tuple(f"grad_{name}" for name in ("x", *MLP_PARAMETERS))

_REMEDY = (
    "install a C++ compiler (Debian: apt install g++; conda: conda install -c conda-forge gxx) "
    "and reinstall: pip install --force-reinstall --no-deps ."
)
_KINDS = {"pointers": ctypes.c_void_p, "doubles": ctypes.c_double, "sizes": ctypes.c_int64, "ints": ctypes.c_int}


def structure(**names: str) -> type[ctypes.Structure]:
    """Arguments of kernels: the names of each kind, in the order of csrc/kernels.h, which says what they mean."""
    fields = [(name, _KINDS[kind]) for kind, own in names.items() for name in own.split()]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


DEPTHWISE = structure(
    pointers="x other bias neighbours out", sizes="patches channels", ints="side kernel reverse_taps threads"
)
GELU_GRN = structure(
    pointers="h bias gamma beta offsets norms y grad grad_gamma grad_beta grad_bias",
    doubles="eps",
    sizes="groups dim",
    ints="threads",
)
LAYER_NORM = structure(
    pointers="grad x mean rstd weight bias normed grad_x grad_weight grad_bias", sizes="rows channels", ints="threads"
)
MLP = structure(
    pointers=" ".join(["x", *MLP_PARAMETERS, "offsets", *MLP_OUTPUTS, "grad", *MLP_GRADS]),
    doubles="norm_eps grn_eps",
    sizes="groups channels dim",
    ints="threads",
)


@cache
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if (wanted := os.environ.get("SPARSE_OPS_CPU")) not in (None, "", *INSTRUCTION_SETS):
        return None, f"SPARSE_OPS_CPU={wanted} is none of {', '.join(INSTRUCTION_SETS)}"
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


def call(function: str, arguments: type[ctypes.Structure], dtype: torch.dtype, **fields: Any) -> None:
    """Call the library's function of that name for numbers of ``dtype``; contiguous tensors go as pointers."""
    library, _ = load()
    assert library is not None
    for name, value in fields.items():
        if isinstance(value, Tensor):
            if not value.is_contiguous():
                raise ValueError(f"{function} takes contiguous tensors; {name} is not: call .contiguous() on it")
            fields[name] = value.data_ptr()
    args = arguments(threads=torch.get_num_threads(), **fields)
    status = getattr(library, function)(ctypes.byref(args), DTYPES[dtype])
    assert status == 0, f"{function} has no kernel for {dtype}"

"""Calling the operators that backends register with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils import _python_dispatch

# Names of torch's own, so they may go: where one is missing, operators are always dispatched.
_profiling = getattr(torch.autograd, "_profiler_enabled", None)
_dispatch_mode = getattr(_python_dispatch, "_get_current_dispatch_mode", None)


def run(operator: CustomOpDef, *args: Any) -> Any:
    """Call the operator where something watches, else its bare function: dispatch costs more than a small layer."""
    bare = getattr(operator, "_init_fn", None)
    if bare is None or _profiling is None or _dispatch_mode is None:
        return operator(*args)
    watched = (
        type(args[0]) is not Tensor or torch.compiler.is_compiling() or _profiling() or _dispatch_mode() is not None
    )
    return operator(*args) if watched else bare(*args)

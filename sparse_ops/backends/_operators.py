"""Calling the operators that backends register with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._python_dispatch import _get_current_dispatch_mode


def run(operator: CustomOpDef, *args: Any) -> Any:
    """Call the operator where something watches, else its bare function: dispatch costs more than a small layer."""
    watched = (
        type(args[0]) is not Tensor
        or torch.compiler.is_compiling()
        or torch.autograd._profiler_enabled()
        or _get_current_dispatch_mode() is not None
    )
    return operator(*args) if watched else operator._init_fn(*args)

"""``python -m sparse_ops``: which backends there are, which can run here, and which ``auto`` would take."""

from __future__ import annotations

import platform
import sys

import torch

from sparse_ops.map_grid import runs_on
from sparse_ops.registry import registry, resolve_backend


def report() -> str:
    """The table that ``python -m sparse_ops`` prints."""
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, CUDA {'yes' if torch.cuda.is_available() else 'no'}",
        "",
    ]
    width = max(len(name) for name in registry())
    for name, backend in registry().items():
        reason = backend.unavailable_reason()
        lines.append(f"{name:<{width}}  {'available  ' if reason is None else 'unavailable'}  {backend.summary}")
        if reason is not None:
            lines.append(f"{'':<{width}}  why: {reason}")
    lines.append("")
    devices = [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]
    lines += [f"auto on {device}: {resolve_backend('auto', device).name}" for device in devices]
    lines += [f"dense networks on {device}: {runs_on('auto', device, torch.float32, 7, True)}" for device in devices]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")

"""What a run was started with and where: ``environment.json``, a session for the start and for each resumption."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convnextv2 import __version__
from convnextv2.data.names import shown
from convnextv2.files import write_json
from convnextv2.models.encoder import Encoder
from convnextv2.training.compiling import DTYPES
from convnextv2.training.device import Accelerator
from sparse_ops.registry import resolve_backend

logger = logging.getLogger(__name__)
NAME = "environment.json"
MOST_BYTES = 2**22
"""Of a file of sessions that is read: some thousand of them."""
_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "triton", "numpy", "pillow")
_SECRET = re.compile(r"(?i)(token|secret|passw|credential|api[-_]?key|(?:^|[-_])key(?:$|[-_=]))")
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_HIDDEN = "***"


def record_session(folder: Path, accelerator: Accelerator, model: nn.Module, step: int, over: bool) -> None:
    """Add a session, beginning now, to the file in the folder of a run; in its first process.

    ``step`` updates were made before. Where the run is ``over``, nothing is written.

    A file that is damaged is begun anew, which the log tells. Raises OSError if it cannot be written.
    """
    if over:
        return
    try:
        before = read_sessions(folder)
    except ValueError as error:
        logger.warning("%s: begun anew: it %s", folder / NAME, error)
        before = []
    write_json(folder / NAME, {"sessions": [*before, session(accelerator, model, step)]})


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """Sessions in the folder of a run, the first one first; none where there is no file.

    Raises:
        ValueError: if the file is no list of sessions; the message goes on from its name.
        OSError: if it cannot be read.
    """
    path = folder / NAME
    if not path.is_file():
        return []
    if path.stat().st_size > MOST_BYTES:
        raise ValueError("is larger than what runs write")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    sessions = found.get("sessions") if isinstance(found, dict) else None
    if not isinstance(sessions, list) or not all(isinstance(one, dict) for one in sessions):
        raise ValueError("holds no list of sessions")
    return sessions


def session(accelerator: Accelerator, model: nn.Module, step: int = 0) -> dict[str, Any]:
    """The present process and machine, after ``step`` updates: names to text and numbers, ``versions`` to a mapping."""
    device = torch.device(accelerator.device)
    return {
        "started": datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
        "after_step": step,
        "command": command(sys.argv),
        "commit": commit(),
        "versions": {"convnextv2": __version__, "python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cuda": torch.version.cuda,
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "backend": backend_of(model, device, DTYPES.get(accelerator.mixed_precision, torch.float32)),
    }


def command(argv: Sequence[str]) -> str:
    """A command line for a shell that would start these arguments, with what looks like a secret left out.

    A secret is the value of an option or variable whose name speaks of a token, key, password or the like, and what
    stands before the @ of an address. Bytes that are no UTF-8 are told by their numbers.
    """
    program, *arguments = argv
    start = program.split() if program.startswith("fcmae ") else ["python", _IN_ADDRESS.sub(_HIDDEN, shown(program))]
    told, hide = list[str](), False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if hide and not argument.startswith("--"):
            argument, hide = _HIDDEN, False
        elif _SECRET.search(name) and value:
            argument, hide = f"{name}{equals}{_HIDDEN}", False
        else:
            hide = name.startswith("-") and not equals and bool(_SECRET.search(name))
        told.append(_IN_ADDRESS.sub(_HIDDEN, shown(argument)))
    return shlex.join([*start, *told])


@cache
def commit() -> str | None:
    """The commit of this source, ``-dirty`` behind it where files differ; None outside of a repository of its own."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed somewhere, perhaps in the repository of another project
        return None
    describe = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        logger.info("git cannot be asked for the commit")
        return None
    return done.stdout.strip() or None


@cache
def processor() -> str:
    """The model of the processor, as well as the system tells it."""
    listed = Path("/proc/cpuinfo")
    text = listed.read_text(encoding="utf-8", errors="replace") if listed.is_file() else ""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.M)
    return found[1] if found else platform.processor() or platform.machine()


def backend_of(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Name of what computes the blocks: of the sparse encoder in pre-training, of a dense pass elsewhere."""
    if isinstance(model, Encoder):
        return model.runs_on
    encoder, choice = getattr(model, "encoder", None), getattr(model, "backend", None)
    if not isinstance(encoder, Encoder) or choice is None:
        return "torch"
    return resolve_backend(choice, device, dtype, encoder.encoder_config.kernel_size).name


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found

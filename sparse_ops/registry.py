"""Finds backends, chooses one, or says why not."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from functools import cache

import torch

from sparse_ops.backend import Backend

logger = logging.getLogger(__name__)


class BackendUnavailableError(RuntimeError):
    """The backend asked for by name cannot run here; the message says why and what to do."""


@cache
def registry() -> dict[str, Backend]:
    """All backends by name, highest priority first."""
    from sparse_ops import backends

    found: list[Backend] = []
    for module in pkgutil.iter_modules(backends.__path__):
        if module.name.startswith("_"):
            continue
        backend = getattr(importlib.import_module(f"{backends.__name__}.{module.name}"), "BACKEND", None)
        if backend is not None:
            found.append(backend)
    found.sort(key=lambda backend: (-backend.priority, backend.name))
    return {backend.name: backend for backend in found}


def get_backend(name: str) -> Backend:
    """The backend of that name, ready to run.

    Raises:
        ValueError: if no backend has that name.
        BackendUnavailableError: if it cannot run here.
    """
    backends = registry()
    if name not in backends:
        raise ValueError(f"unknown backend {name!r}; choose auto or one of {', '.join(backends)}")
    reason = backends[name].unavailable_reason()
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")
    return backends[name]


@cache
def _auto(device_type: str) -> Backend:
    device = torch.device(device_type)
    for backend in registry().values():
        if backend.rejects(device, torch.float32, 7) is not None:
            continue
        reason = backend.unavailable_reason() or backend.check(device)
        if reason is None:
            logger.info("backend auto: chose %s for %s", backend.name, device_type)
            return backend
        logger.warning("backend auto: the faster %s is not available: %s", backend.name, reason)
    raise BackendUnavailableError(f"no backend serves device {device_type!r}")


def resolve_backend(name: str | Backend, device: torch.device) -> Backend:
    """The backend for ``name`` on ``device``; ``auto`` takes the best that is available there and logs the choice.

    Raises:
        ValueError: if no backend has that name, or the named one does not serve the device.
        BackendUnavailableError: if the named one cannot run here. There is no silent fallback.
    """
    if isinstance(name, Backend):
        return name
    return _auto(device.type) if name == "auto" else get_backend(name)

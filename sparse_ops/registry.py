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
    # By name: the registry knows no backend, and each of them knows what lies below it.
    backends = importlib.import_module("sparse_ops.backends")
    names = [module.name for module in pkgutil.iter_modules(backends.__path__) if not module.name.startswith("_")]
    modules = [importlib.import_module(f"{backends.__name__}.{name}") for name in names]
    found: list[Backend] = [module.BACKEND for module in modules if hasattr(module, "BACKEND")]
    found.sort(key=lambda backend: (-backend.priority, backend.name))
    return {backend.name: backend for backend in found}


def get_backend(name: str) -> Backend:
    """The backend of that name, ready to run; ValueError if there is none, BackendUnavailableError if it cannot run
    here."""
    backends = registry()
    if name not in backends:
        raise ValueError(f"unknown backend {name!r}; choose auto or one of {', '.join(backends)}")
    reason = backends[name].unavailable_reason()
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")
    return backends[name]


@cache
def _checked(backend: Backend, device: torch.device) -> str | None:
    """What is wrong with a backend that is available, by its own check; once for a device."""
    return backend.check(device)


@cache
def _auto(device: torch.device, dtype: torch.dtype, kernel_size: int) -> Backend:
    for backend in registry().values():
        if backend.rejects(device, dtype, kernel_size) is not None:
            continue
        reason = backend.unavailable_reason() or _checked(backend, device)
        if reason is None:
            logger.info("backend auto: chose %s for %s, %s, kernel size %d", backend.name, device, dtype, kernel_size)
            return backend
        logger.warning("backend auto: the faster %s is not available: %s", backend.name, reason)
    raise BackendUnavailableError(f"no backend serves {dtype} and kernel size {kernel_size} on {device}")


def resolve_backend(
    name: str | Backend, device: torch.device, dtype: torch.dtype = torch.float32, kernel_size: int = 7
) -> Backend:
    """The backend for ``name``; ``auto`` takes the best one that is available and serves such inputs, and logs it.

    A backend that is named is not asked what it serves: it says so when it is called. There is no silent fallback.

    Args:
        name: ``auto``, a backend's name, or a backend, which is returned.
        device: where it will run.
        dtype: of the features.
        kernel_size: of the depthwise convolution.

    Raises:
        ValueError: if no backend has that name.
        BackendUnavailableError: if the named one cannot run here, or ``auto`` finds none.
    """
    if isinstance(name, Backend):
        return name
    return _auto(device, dtype, kernel_size) if name == "auto" else get_backend(name)

"""What the processes of a run do as one, and what they keep other runs from."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

try:
    import fcntl
except ImportError:  # on Windows, where nothing is held
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
R = TypeVar("R")
_held: set[int] = set()


def after_a_restart(minutes: float) -> list[Any]:
    """Handlers for accelerate that give up a process after so many minutes without an answer, and that let the
    processes of one node meet after torchrun has started them again.

    The store through which they find each other outlives them, with the addresses of those that have ended, so each
    attempt uses names of its own in it. torch has none: it takes the store to be new.
    """
    from accelerate import InitProcessGroupKwargs
    from torch import distributed

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")  # others may count differently
    if attempt == "0" or not one_node or not distributed.is_available() or distributed.is_initialized():
        return [InitProcessGroupKwargs(timeout=timedelta(minutes=minutes))]

    def meet(url: str, **options: Any) -> Iterator[tuple[Any, int, int]]:
        for store, rank, world_size in distributed.rendezvous(url.replace(scheme, "env", 1), **options):
            yield distributed.PrefixStore(f"attempt_{attempt}", store), rank, world_size

    scheme = "after-restart"
    with contextlib.suppress(RuntimeError):  # it is known from an accelerator that could not be made
        distributed.register_rendezvous_handler(scheme, meet)
    return [InitProcessGroupKwargs(init_method=f"{scheme}://", timeout=timedelta(minutes=minutes))]


def leave_at_exit() -> None:
    """Have this process leave the group of a run that has ended in all of them before Python winds down.

    Else the threads of gloo may let go of a tensor when Python is half gone, which aborts one process in fifty after
    its work is done. Not for a process that fails alone: it would wait for what the others owe it.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def in_first_process(work: Callable[[], R]) -> R:
    """What ``work`` returns, or raises, in the first process of a run, in all of them; the others wait for it."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold ``folder``, which exists, for this process until the block or the process ends, however that ends.

    File systems that cannot lock a folder, such as some NFS, let everyone in.

    Raises:
        ValueError: if another process, or another run of this one, holds it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


def take(folder: Path, claim: Callable[[], Any], before: Any, held: contextlib.ExitStack) -> None:
    """Make ``folder`` and hold it, until ``held`` is closed, unless it is another's or no longer what it was.

    Raises:
        ValueError: as :func:`only_run_in`, or if ``claim`` says something else than ``before``.
        OSError: if it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(only_run_in(folder))
    if claim() != before:
        raise ValueError(f"{folder}: was changed by another run while this one was set up; start it again")


def tracker_of(asked: str | None) -> str | None:
    """The tracker that an option asks for, with auto and none resolved; None for none."""
    if asked == "auto":
        return "tensorboard" if importlib.util.find_spec("tensorboard") is not None else None
    return None if asked == "none" else asked


def start_tracker(accelerator: Any, project: str, asked: str | None) -> None:
    """Start the tracker that is asked for; ValueError if it does not."""
    if (tracker := tracker_of(asked)) is not None:
        try:
            accelerator.init_trackers(project)
        except Exception as error:  # each tracker has errors of its own
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"`tracker` {tracker} cannot be started: {reason}") from error


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{folder}: another run is at work there; wait for it, stop it, or name another `output`"
        ) from error
    except OSError:
        logger.debug("%s cannot be locked", folder)


def _release() -> None:
    while _held:
        os.close(_held.pop())


if fcntl is not None:  # a worker that outlives its run for a moment would keep the next one out
    os.register_at_fork(after_in_child=_release)

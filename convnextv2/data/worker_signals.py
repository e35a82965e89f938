"""Processes that load images: they leave signals that reach all of a job to the main process, and give way to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def leave_signals_to_main(worker: int = 0) -> None:
    """Have this process, which loads images, live on when a signal reaches all processes of a group or a job: the main
    process saves, and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_if_told, daemon=True).start()


def give_way(worker: int = 0) -> None:
    """The same, at a lower priority: for loading beside a network on the same processors, each of whose threads waits
    for the others, so that what is taken from one of them is taken from all."""
    leave_signals_to_main(worker)
    if hasattr(os, "nice"):
        os.nice(10)


def _end_if_told() -> None:
    parent = multiprocessing.parent_process()
    while parent is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)

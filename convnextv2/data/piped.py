"""Shards that a command writes, as WebDataset names them: ``pipe:curl -s https://…``.

A stream cannot be read by number, nor again by another process or a run that is resumed. So the command is run once, in
a shell, and what it writes is kept in the user's cache.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from pathlib import Path

from convnextv2.data.spool import check_free, spooled
from convnextv2.data.tar_index import scan
from convnextv2.messages import one_line

PIPE = "pipe:"


class PipeError(ValueError):
    """The command failed, or wrote no shard; the message, one line, leaves the command out."""


def piped(spec: str) -> Path:
    """The file that the command behind ``pipe:`` writes, by this call or an earlier one.

    Raises:
        PipeError: if the command fails or writes no tar with images, which is then not kept.
        DataError: if the cache cannot be written.
    """

    def write(path: Path) -> None:
        _run(spec, path)
        with path.open("rb") as file:
            found = scan(file, path.stat().st_size)
        if not found.names:
            raise PipeError(f"writes no tar with images: {path.stat().st_size} bytes in all")

    return spooled(spec, spec, ".tar", write)


def _run(spec: str, path: Path) -> None:
    with tempfile.TemporaryFile() as said, path.open("wb") as file:
        process = subprocess.Popen(
            spec.removeprefix(PIPE),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            while piece := os.read(process.stdout.fileno(), 2**20):
                check_free(path.parent)
                file.write(piece)
            status = process.wait()
        finally:
            process.stdout.close()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the shell, and what it started
                process.wait()
        if status:
            said.seek(0)
            last = said.read()[-1000:].decode("utf-8", "replace").strip().splitlines()[-1:]
            raise PipeError(f"{''.join(f'{one_line(line)[:200]}; ' for line in last)}ended with status {status}")

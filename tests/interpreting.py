"""Python whose Triton interprets in less time: ``python tests/interpreting.py -c CODE``, or ``-m MODULE``.

The interpreter replaces what ``triton.language`` defines before every call of a function inside of a kernel, though a
launch finds it replaced after the first: a fifth of its time. A Triton that works otherwise is left as it is.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any


def patch_once_a_launch() -> None:
    """Let each module's names be replaced once a launch."""
    try:
        from triton.runtime import interpreter

        patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    except (ImportError, AttributeError):
        return
    patched = set[int]()

    class Kept:
        def restore(self) -> None:
            """What the first call replaced is put back by its own."""

    def once(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return Kept()
        patched.add(id(function.__globals__))
        return patch(function)

    def launched(*args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched


if __name__ == "__main__":
    how, what, *arguments = sys.argv[1:]
    sys.path[0] = ""  # as Python has it for -c and -m
    sys.argv = [how, *arguments]
    patch_once_a_launch()
    if how == "-c":
        exec(compile(what, "<string>", "exec"))
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)

"""Python whose Triton interprets in less time: ``python tests/interpreting.py -c CODE``, or ``-m MODULE``.

Kernels compute the same bits. What the interpreter does for each operation takes a hundred times as long as the
arithmetic, and most of it is needed once or never. A Triton that works otherwise is left as it is.
"""

from __future__ import annotations

import runpy
import sys
from contextlib import suppress
from functools import cache
from typing import Any

from scipy.special import erf


def replace_names_once_a_launch() -> None:
    """Not before every call of a function inside of a kernel: a launch finds them replaced after the first."""
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
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


def same_shape(a: Any, b: Any) -> bool:
    """Whether they are tensors that need not be broadcast."""
    return (
        hasattr(a, "handle")
        and hasattr(b, "handle")
        and a.type.is_block() == b.type.is_block()
        and a.handle.data.shape == b.handle.data.shape
    )


def alike(a: Any, b: Any) -> bool:
    """Whether they are numbers of one type that need not be broadcast either."""
    return same_shape(a, b) and a.dtype is b.dtype and not a.dtype.is_ptr()


def take_operands_that_are_alike() -> None:
    """Without working out common types and shapes of two that have the same."""
    from triton import language
    from triton.language.semantic import TritonSemantic

    check, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    usual = language.fma

    def checked(self: Any, lhs: Any, rhs: Any, *rules: bool, **named: bool) -> Any:
        divides = len(rules) > 3 or named
        return (lhs, rhs) if not divides and alike(lhs, rhs) else check(self, lhs, rhs, *rules, **named)

    def broadcasted(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if same_shape(lhs, rhs) else broadcast(self, lhs, rhs)

    @language.core.builtin
    def fma(x: Any, y: Any, z: Any, _semantic: Any = None) -> Any:
        if x.dtype is not language.float32 or not (alike(x, y) and alike(x, z)):
            return usual(x, y, z, _semantic=_semantic)
        total = object.__new__(type(z))
        total.__dict__.update(z.__dict__, handle=_semantic.builder.create_fma(x.handle, y.handle, z.handle))
        return total

    TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value = checked, broadcasted
    language.fma = language.math.fma = fma


def type_tuples_when_asked() -> None:
    """A kernel that holds its sums in a tuple makes many, whose types are those of all members, spelt out."""
    from triton.language import core

    make = core.tuple.__init__

    class Type:
        def __get__(self, owner: Any, kind: Any = None) -> Any:
            if "type" not in owner.__dict__:
                owner.__dict__["type"] = core._type_for_tuple_values(owner.values)
            return owner.__dict__["type"]

        def __set__(self, owner: Any, value: Any) -> None:
            owner.__dict__["type"] = value

    def made(self: Any, args: Any, type: Any = None) -> None:
        if type is None:
            self.values = [*args]
        else:
            make(self, args, type)

    core.tuple.__init__, core.tuple.type = made, Type()


def compute_with_numpy() -> None:
    """The error function of all numbers at once; NumPy's type for Triton's looked up; integers computed once, not again
    to see whether they overflow, which only ``debug`` would tell."""
    from triton.runtime import interpreter

    numpy_type = interpreter._get_np_dtype
    of_numbers = cache(numpy_type)
    interpreter._get_np_dtype = lambda kind: (numpy_type if kind.scalar.is_ptr() else of_numbers)(kind.scalar)
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.np_erf_fp32 = lambda x: erf(x.astype("float64")).astype("float32")


def shorten() -> None:
    """Everything that this Triton is made for."""
    for way in (replace_names_once_a_launch, take_operands_that_are_alike, type_tuples_when_asked, compute_with_numpy):
        with suppress(ImportError, AttributeError):
            way()


if __name__ == "__main__":
    how, what, *arguments = sys.argv[1:]
    sys.path[0] = ""  # as Python has it for -c and -m
    sys.argv = [how, *arguments]
    shorten()
    if how == "-c":
        exec(compile(what, "<string>", "exec"))
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)

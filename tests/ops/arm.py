"""The C++ kernels of the ``cpu`` backend on Arm, run by QEMU, through the conformance cases: ``make arm``.

Not collected by name: these tests need what ``make arm`` builds, QEMU, and the libraries of a cross compiler. Torch and
the oracle run on this processor; a call of a kernel goes to ``emulated.cpp`` with copies of all its tensors.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from ctypes import Structure, memmove, string_at
from pathlib import Path
from typing import Any

import pytest
import torch
from test_determinism import test_threads_do_not_change_a_bit  # noqa: F401  # collected here, on Arm
from torch import Tensor

from sparse_ops import registry
from sparse_ops.backends.cpu import library, maps, operators
from sparse_ops.conformance import check_conformance, check_mlp_conformance
from sparse_ops.conformance_cases import CASES, MLP_CASES, ConformanceCase, random_case
from sparse_ops.conformance_maps import MAP_SHAPES, RESULT_CASES, check_map_conformance, check_result_conformance

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build/arm"
SYSROOT = Path("/usr/aarch64-linux-gnu")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
CPU, DEVICE = registry()["cpu"], torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def sized(contents: bytes) -> bytes:
    return struct.pack("<Q", len(contents)) + contents


class Emulated:
    """The library on Arm, in the place of :mod:`sparse_ops.backends.cpu.library`'s ``call`` and ``load``."""

    def __init__(self, *openmp: str) -> None:
        assert EMULATOR, "QEMU is not there; Debian: apt install qemu-user"
        built = BUILT / "emulated", BUILT / "sparse_ops/backends/cpu/_cpu.so"
        self._process = subprocess.Popen(
            [EMULATOR, "-L", SYSROOT, *built, *openmp], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.instruction_set, self.threads, self.version = (self._text().decode() for _ in range(3))
        self.called: set[tuple[str, torch.dtype]] = set()

    def close(self) -> int:
        self._process.communicate()
        return self._process.returncode

    def _read(self, count: int) -> bytearray:
        assert self._process.stdout is not None
        found = bytearray(self._process.stdout.read(count))
        assert len(found) == count, "the emulated program has ended"
        return found

    def _text(self) -> bytearray:
        return self._read(struct.unpack("<Q", self._read(8))[0])

    def call(self, function: str, arguments: type[Structure], dtype: torch.dtype, **fields: Any) -> None:
        """As :func:`sparse_ops.backends.cpu.library.call`."""
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in fields.items() if name not in tensors}
        message = sized(function.encode()) + struct.pack("<i", library.DTYPES[dtype])
        message += sized(bytes(arguments(threads=torch.get_num_threads(), **plain)))
        message += struct.pack("<Q", len(tensors))
        for name, tensor in tensors.items():
            assert tensor.is_contiguous()
            message += struct.pack("<Q", getattr(arguments, name).offset)
            message += sized(string_at(tensor.data_ptr(), tensor.nbytes))
        assert self._process.stdin is not None
        self._process.stdin.write(message)
        self._process.stdin.flush()
        (status,) = struct.unpack("<i", self._read(4))
        for tensor in tensors.values():
            memmove(tensor.data_ptr(), bytes(self._text()), tensor.nbytes)
        assert status == 0, f"{function}, {dtype}: " + {-1: "no kernel", -2: "writes beyond a tensor"}[status]
        self.called.add((function, dtype))


class NoKernels:
    """Stands for the library of this processor, which must not be called."""


@pytest.fixture(scope="module", params=[(), ("libgomp.so.1",)], ids=["std::thread", "OpenMP"])
def arm(request: pytest.FixtureRequest) -> Iterator[Emulated]:
    emulated = Emulated(*request.param)
    yield emulated
    assert emulated.close() == 0


@pytest.fixture(autouse=True)
def on_arm(arm: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "call", arm.call)
    monkeypatch.setattr(maps, "call", arm.call)
    monkeypatch.setattr(library, "load", lambda: (NoKernels(), None))


def test_what_runs_is_the_library_on_arm(arm: Emulated, request: pytest.FixtureRequest) -> None:
    assert (arm.instruction_set, arm.version) == ("baseline", str(library.INTERFACE_VERSION))
    assert arm.threads == {"std::thread": "std::thread", "OpenMP": "OpenMP of torch"}[request.node.callspec.id]
    header = (BUILT / "sparse_ops/backends/cpu/_cpu.so").read_bytes()[:20]
    assert header[:5] == b"\x7fELF\x02"
    assert struct.unpack("<H", header[18:]) == (183,)  # AArch64


def checked(case: ConformanceCase, dtype: torch.dtype) -> bool:
    """False for kernel sizes that are not served."""
    if CPU.rejects(DEVICE, dtype, case.kernel_size) is not None:
        return False
    check_conformance(CPU, case, dtype)
    return True


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise_conforms(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    assert sum(checked(case, dtype) for case in CASES) == sum(case.kernel_size in (3, 5, 7) for case in CASES)


@pytest.mark.parametrize("chunk", range(4))
def test_depthwise_conforms_on_random_cases(chunk: int) -> None:
    torch.set_num_threads(1 + chunk)
    seeds = range(chunk * 50, chunk * 50 + 50)
    assert sum(checked(random_case(seed), DTYPES[seed % 3]) for seed in seeds) == 50


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_pointwise_half_conforms(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    for case in MLP_CASES:
        assert len(check_mlp_conformance(CPU, case, dtype)) == 10


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_results_conform(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    for case in RESULT_CASES:
        check_result_conformance(CPU, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_for_maps_conform(dtype: torch.dtype) -> None:
    torch.set_num_threads(3)
    for shape in MAP_SHAPES:
        check_map_conformance(maps.CPUMaps(), shape, dtype)


def test_the_cases_call_every_kernel(arm: Emulated) -> None:
    """A kernel that none of them calls would be judged by none."""
    arm.called.clear()
    for dtype in DTYPES:
        assert checked(CASES[0], dtype)
        check_map_conformance(maps.CPUMaps(), MAP_SHAPES[0], dtype)
        for case in MLP_CASES[:2] if dtype != torch.bfloat16 else ():
            check_mlp_conformance(CPU, case, dtype)
        for case in RESULT_CASES[:2] if dtype != torch.bfloat16 else ():
            check_result_conformance(CPU, case, dtype)
    source = (ROOT / "sparse_ops/backends/cpu/csrc/dispatch.cpp").read_text(encoding="utf-8")
    exported = {f"sparse_ops_{name}" for name in re.findall(r"^EXPORT_KERNEL\((\w+)\)$", source, re.M)}
    floats = {(name, dtype) for name in exported for dtype in DTYPES[:2]}
    assert len(exported) >= 7
    assert arm.called == floats | {(name, torch.bfloat16) for name in exported if "depthwise" in name}


def test_what_is_wrong_is_found(arm: Emulated) -> None:
    """A row too few for what is written, and results that come from reversed taps."""
    case = next(case for case in CASES if case.name == "C=40")

    def shorter(function: str, arguments: type[Structure], dtype: torch.dtype, **fields: Any) -> None:
        arm.call(function, arguments, dtype, **fields | {"out": fields["out"][1:]})

    def reversed_taps(function: str, arguments: type[Structure], dtype: torch.dtype, **fields: Any) -> None:
        turned = {"reverse_taps": not fields["reverse_taps"]} if "reverse_taps" in fields else {}
        arm.call(function, arguments, dtype, **fields | turned)

    for fault, report in ((shorter, "writes beyond a tensor"), (reversed_taps, "error")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operators, "call", fault)
            with pytest.raises(AssertionError, match=report):
                check_conformance(CPU, case)

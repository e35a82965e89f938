"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: ``make sanitize``.

Not collected by name: these tests need the library that ``make sanitize`` builds, in ``SPARSE_OPS_CPU_LIBRARY``.
"""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from sparse_ops.conformance_cases import CASES, MLP_CASES
from sparse_ops.conformance_maps import MAP_SHAPES, RESULT_CASES

ROOT = Path(__file__).parents[2]
LIBRARY = os.environ["SPARSE_OPS_CPU_LIBRARY"]
WIDTHS = {"baseline": ("DEFAULT", "AVX2", "AVX512"), "avx2": ("AVX2", "AVX512"), "avx512": ("AVX512",)}
"""Of an instruction set: what torch calls processors that have it."""
RANDOM = 20

CONFORMS = f"""
import torch
from sparse_ops import registry
from sparse_ops.backends.cpu import library
from sparse_ops.conformance import check_conformance, check_mlp_conformance
from sparse_ops.conformance_cases import CASES, MLP_CASES, random_case
from sparse_ops.conformance_maps import MAP_SHAPES, RESULT_CASES, check_map_conformance, check_result_conformance

torch.set_num_threads(2)
backend, device = registry()["cpu"], torch.device("cpu")
assert backend.unavailable_reason() is None, backend.unavailable_reason()
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for case in (*CASES, *map(random_case, range({RANDOM} if dtype == torch.float32 else 0))):
        if backend.rejects(device, dtype, case.kernel_size) is None:
            check_conformance(backend, case, dtype, device)
            print("passed", dtype, case)
    for case in MLP_CASES if dtype != torch.bfloat16 else ():
        check_mlp_conformance(backend, case, dtype, device)
        print("passed", dtype, case)
    for case in RESULT_CASES if dtype != torch.bfloat16 else ():
        check_result_conformance(backend, case, dtype)
        print("passed", dtype, case)
    for shape in MAP_SHAPES:
        check_map_conformance(backend.maps, shape, dtype)
        print("passed", dtype, shape)
loaded, _ = library.load()
print("instruction set", loaded.sparse_ops_instruction_set().decode())
for name in vars(loaded):
    print("called", name)
"""

FAULTY = """
import sys, torch
from sparse_ops import ActiveSet, registry

backend, active = registry()["cpu"], ActiveSet.full(1, (2, 2), 4)
rows = active.num_cells
x, weight = torch.zeros(rows, 16), torch.zeros(16, 1, 7, 7)
wide, narrow = torch.zeros(64, 16), torch.zeros(16)
parameters = [narrow, narrow, wide, *wide.T.contiguous()[:3], wide.T.contiguous(), narrow]

def depthwise(missing, _):
    backend.depthwise(x[missing:].clone(), weight, None, active, reverse_taps=False)

def depthwise_weight_grad(missing, _):
    backend.depthwise_weight_grad(x, x[missing:].clone(), active, 7)

def mlp(missing, _):
    torch.ops.sparse_ops.cpu_mlp(x[missing:].clone(), parameters, torch.tensor([0, rows]), 1e-6, 1e-6)

def misaligned(_, bytes):
    table = active.patch_neighbours(7)
    moved = torch.zeros(4 * table.numel() + bytes, dtype=torch.uint8)[bytes:]
    pretended = torch.from_numpy(moved.numpy()[: 4 * table.numel()].view("int32").reshape(table.shape))
    torch.ops.sparse_ops.cpu_depthwise(x, weight, None, pretended, 4, False)

call = globals()[sys.argv[1]]
call(0, 0)
print("right", flush=True)
call(1, 1)
print("unseen", flush=True)
"""


@cache
def preloaded() -> str:
    """The runtime of AddressSanitizer, which must be loaded first, and that of C++, whose exceptions it follows."""
    listed = subprocess.run(["ldd", LIBRARY], capture_output=True, text=True, check=True).stdout
    found = [re.search(rf"=> (\S*/{name}\.so\S*)", listed) for name in ("libasan", r"libstdc\+\+")]
    assert all(found), f"{LIBRARY} is no build of `make sanitize`:\n{listed}"
    return " ".join(match[1] for match in found if match)


def run_python(code: str, *arguments: str, instruction_set: str = "") -> subprocess.CompletedProcess[str]:
    settings = {"LD_PRELOAD": preloaded(), "SPARSE_OPS_CPU": instruction_set, "OMP_NUM_THREADS": "1"}
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}  # Python leaks at its end
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **settings, **options},
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.parametrize("instruction_set", WIDTHS)
def test_the_conformance_cases_show_nothing(instruction_set):
    """All kernels, in every dtype, from two threads."""
    if torch.backends.cpu.get_cpu_capability() not in WIDTHS[instruction_set]:
        pytest.skip(f"this device has no {instruction_set}")
    done = run_python(CONFORMS, instruction_set=instruction_set)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-6000:]
    told = done.stdout.splitlines()
    assert f"instruction set {instruction_set}" in told
    served = [case for case in CASES if case.kernel_size in (3, 5, 7)]
    passed = sum(line.startswith("passed ") for line in told)
    assert passed == 3 * len(served) + RANDOM + 2 * len((*MLP_CASES, *RESULT_CASES)) + 3 * len(MAP_SHAPES)
    source = (ROOT / "sparse_ops/backends/cpu/csrc/dispatch.cpp").read_text(encoding="utf-8")
    exported = {f"sparse_ops_{name}" for name in re.findall(r"^EXPORT_KERNEL\((\w+)\)$", source, re.M)}
    assert len(exported) >= 4
    assert exported <= {line.removeprefix("called ") for line in told}


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("depthwise", r"AddressSanitizer: heap-buffer-overflow(?s:.*)depthwise_halo\.inc:\d+"),
        ("depthwise_weight_grad", r"AddressSanitizer: heap-buffer-overflow(?s:.*)depthwise_halo\.inc:\d+"),
        ("mlp", r"AddressSanitizer: heap-buffer-overflow(?s:.*)mlp\.inc:\d+"),
        ("misaligned", r"csrc/\w+\.\w+:\d+:\d+: runtime error: load of misaligned address"),
    ],
)
def test_what_is_wrong_is_found(fault, report):
    """A row too few, and a table of integers at an odd address, each after the same call with nothing wrong."""
    done = run_python(FAULTY, fault)
    assert done.stdout == "right\n", done.stdout + done.stderr[-3000:]
    assert done.returncode != 0
    assert re.search(report, done.stderr), done.stderr[-3000:]

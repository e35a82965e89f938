"""The Triton kernels without a GPU: interpreted through the conformance suite, and compiled for three architectures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_ops import registry
from sparse_ops.active_set import reach
from sparse_ops.backends.triton import blocks

triton = pytest.importorskip("triton")
STAGES = [(8, 40), (8, 96), (4, 192), (2, 384), (1, 768), (1, 2816)]


INTERPRETED = """
import sys, torch
from sparse_ops import resolve_backend
from sparse_ops.testing import CASES, check_conformance

dtypes, names = sys.argv[1].split(","), sys.argv[2].split(";")
cases = [case for case in CASES if case.name in names]
assert len(cases) == len(names), names
for case in cases:
    for dtype in dtypes:
        check_conformance("triton", case, getattr(torch, dtype), "cpu")
        print("passed", dtype, case)
"""


def interpreted(dtypes: str, *cases: str) -> list[str]:
    """What passed in a process in which Triton interprets its kernels: slow, hence some of the suite's cases only."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, dtypes, ";".join(cases)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "case",
    [
        "C=13",
        "ragged, first image without visible patches",
        "nothing visible",
        "side 2, a kernel over several patches",
        "side 1, a patch a cell",
        "kernel 3",
        "kernel 5, side 2",
        "no bias",
    ],
)
def test_kernels_conform_under_the_interpreter(case):
    dtypes = "float32,bfloat16,float16" if case == "kernel 5, side 2" else "float32"
    assert len(interpreted(dtypes, case)) == len(dtypes.split(","))


def test_it_says_why_it_cannot_run_and_auto_does_not_take_it():
    backend = registry()["triton"]
    reason = backend.unavailable_reason()
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "CUDA" in reason
    assert "on CUDA" in backend.rejects(torch.device("cpu"), torch.float32, 7)
    assert "float64" in backend.rejects(torch.device("cuda"), torch.float64, 7)
    assert "kernel size 9" in backend.rejects(torch.device("cuda"), torch.float32, 9)


@pytest.mark.parametrize(("side", "channels"), [(8, 40), (4, 80), (2, 160), (1, 320), (1, 2816), (8, 3)])
def test_blocks_cover_little_more_than_the_channels(side, channels):
    for block in blocks(side, channels):
        assert 256 <= block.patches * side * block.channels <= 1024
        assert block.channels < 2 * max(channels, 16)
        assert block.warps in (1, 2, 4)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack, shared and local memory of a kernel, from the program that Triton brings."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", listing)}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("side", "channels"), STAGES)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernels_compile_without_spilling(architecture, side, channels, dtype, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparse_ops.backends import _triton_kernels as kernels

    block = blocks(side, channels)[0]
    constants = {"CHANNELS": channels, "SIDE": side, "KERNEL": 7, "REACH": reach(7, side)}
    constants |= {"PATCHES": block.patches, "BLOCK_C": block.channels}
    pointers = {"x": dtype, "grad": dtype, "out": dtype, "weight": "fp32", "bias": "fp32", "partial": "fp32"}
    pointers["neighbours"] = "i32"
    for kernel in (kernels.depthwise_kernel, kernels.depthwise_weight_grad_kernel):
        names = [parameter.name for parameter in kernel.params]
        known = constants | ({"REVERSE": True, "HAS_BIAS": True} if "out" in names else {})
        signature = {
            name: "constexpr" if name in known else f"*{pointers[name]}" if name in pointers else "i32"
            for name in names
        }
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers}
        source = ASTSource(kernel, signature=signature, constexprs=known, attrs=aligned)
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": block.warps})
        used = resources(compiled.asm["cubin"], tmp_path)
        assert used["LOCAL"] == 0, f"{kernel.__name__} spills"
        assert used["STACK"] == 0, f"{kernel.__name__} spills"
        assert used["SHARED"] <= 16 * 1024
        assert used["REG"] < 255

"""The Triton kernels without a GPU: interpreted through the conformance suite, and compiled for three architectures."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from sparse_ops import registry
from sparse_ops.active_set import reach
from sparse_ops.backends.triton import launch
from sparse_ops.backends.triton.depthwise import (
    ANY,
    KERNEL_SIZES,
    Stage,
    kernel_width,
    program_shape,
    slice_length,
    tile_side,
)
from sparse_ops.backends.triton.launch import kernels_of
from sparse_ops.backends.triton.mlp import COPIED, finish_tile, hidden_tile, norm_tile, scale_tile
from sparse_ops.backends.triton.products import add_product, product
from sparse_ops.conformance_cases import CASES, MLP_CASES, random_case

triton = pytest.importorskip("triton")
FOLDER = Path(launch.__file__).parent
# Every architecture in both types, every side in both types; 8 cells a side, which take a minute, once: see the docs.
COMPILED = [(80, "bf16", 2, 384), (80, "fp32", 1, 768), (90, "bf16", 4, 192), (90, "fp32", 2, 384)]
COMPILED += [(100, "bf16", 1, 768), (100, "fp32", 4, 192), (90, "bf16", 8, ANY)]
COMPILED += [pytest.param(90, "bf16", 8, 96, marks=pytest.mark.slow)]
COMPILED_MLP = [(80, "bf16", 40), (80, "fp32", 96), (90, "bf16", 96), (90, "fp32", 2816)]
COMPILED_MLP += [(100, "bf16", 2816), (100, "fp32", 768)]


INTERPRETED = """
import sys, torch
from sparse_ops import registry
from sparse_ops.conformance import check_conformance, check_mlp_conformance
from sparse_ops.conformance_block import check_block_conformance
from sparse_ops.conformance_cases import CASES, MLP_CASES, random_case

dtype, backend, chosen = getattr(torch, sys.argv[1]), registry()["triton"], slice(*map(int, sys.argv[2:]))
checks = [(check_conformance, case) for case in (*CASES, *map(random_case, range(6)))]
checks += [(check_mlp_conformance, case) for case in MLP_CASES]
checks += [(check_block_conformance, case) for case in CASES[7:20:2]]
for check, case in checks[chosen]:
    if backend.rejects(torch.device("cpu"), dtype, getattr(case, "kernel_size", 7)) is None:
        check(backend, case, dtype, "cpu")
        print("passed", case)
"""


SHARES = [(dtype, first, 2) for dtype in ("float32", "bfloat16", "float16") for first in (0, 1)]
"""Every case in every type: the type, the first case and the step. Each share in a process of its own, so that several
cores are busy."""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "first", "step"), SHARES)
def test_kernels_conform_under_the_interpreter(interpreted, dtype, first, step):
    """Every case of the suite, in processes in which Triton interprets its kernels."""
    checks = [*CASES, *map(random_case, range(6)), *MLP_CASES, *CASES[7:20:2]]
    told = interpreted("-c", INTERPRETED, dtype, first, len(checks), step, timeout=900)
    chosen = checks[first::step]
    served = [str(case) for case in chosen if getattr(case, "kernel_size", 7) in KERNEL_SIZES]
    assert [line.removeprefix("passed ") for line in told.splitlines()] == served


@pytest.mark.slow
def test_operators_pass_opcheck_under_the_interpreter(interpreted_tests):
    assert "1 passed" in interpreted_tests(Path(__file__).with_name("test_conformance.py"), "pass_opcheck", 600)


ADDED = """
import torch
from sparse_ops import ActiveSet, registry
from sparse_ops.backends.triton.depthwise import triton_depthwise

active = ActiveSet.from_mask(torch.tensor([[[0.0, 1, 0], [1, 0, 0]]]), side=2)
x, weight = torch.randn(active.num_cells, 5, dtype=torch.bfloat16), torch.randn(5, 1, 3, 3)
add = torch.randn(5, active.num_cells).t()  # transposed
found = triton_depthwise(x, weight, None, active.patch_neighbours(3), 2, True, add)
expected = registry()["reference"].depthwise(x.float(), weight, None, active, reverse_taps=True) + add
assert found.dtype == torch.float32
torch.testing.assert_close(found, expected)
"""


def test_a_tensor_is_added_in_float32_and_gives_the_dtype(interpreted):
    interpreted("-c", ADDED)


def test_it_says_why_it_cannot_run():
    backend = registry()["triton"]
    reason = backend.unavailable_reason()
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "CUDA" in reason
    assert "on CUDA" in backend.rejects(torch.device("cpu"), torch.float32, 7)
    assert "float64" in backend.rejects(torch.device("cuda"), torch.float64, 7)
    assert "kernel size 9" in backend.rejects(torch.device("cuda"), torch.float32, 9)


@pytest.mark.parametrize("old", [0, 1])
def test_it_judges_the_device_that_is_asked_for(old, monkeypatch):
    """One GPU of two is too old, the current one or the other."""
    backend = registry()["triton"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")

    def capability(device=None):
        index = torch.device(device or "cuda").index or 0
        return (7, 5) if index == old else (9, 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    assert backend.unavailable_reason() is None
    reasons = [backend.rejects(torch.device("cuda", index), torch.float32, 7) for index in (0, 1)]
    assert reasons[1 - old] is None
    assert f"8.0 or newer; cuda:{old} is GPU cuda:{old}" in reasons[old]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "8.0 or newer" in backend.unavailable_reason()


SWITCHES = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@pytest.mark.parametrize("before", [True, False])
def test_products_are_summed_in_float32_and_the_users_switches_stay(before, monkeypatch):
    switches, seen, multiply = torch.backends.cuda.matmul, [], torch.mm
    users = [getattr(switches, name) for name in SWITCHES]
    for name in SWITCHES:
        setattr(switches, name, before)

    def watched(*args, **options):
        seen.append([getattr(switches, name) for name in SWITCHES])
        return multiply(*args, **options)

    monkeypatch.setattr(torch, "mm", watched)
    a, b = torch.randn(5, 7).bfloat16(), torch.randn(7, 3).bfloat16()
    assert torch.equal(product(a, b), a @ b)
    wide = product(a, b, torch.float32)
    assert wide.dtype == torch.float32
    assert (wide - a.double() @ b.double()).abs().max() < 1e-5
    begun = torch.randn(5, 3)
    expected = begun + wide
    add_product(begun, a, b)
    assert torch.allclose(begun, expected, atol=1e-6)
    assert seen == [[False, False]] * 2
    assert [getattr(switches, name) for name in SWITCHES] == [before] * 2
    with pytest.raises(RuntimeError):
        product(a, a)
    assert [getattr(switches, name) for name in SWITCHES] == [before] * 2
    for name, value in zip(SWITCHES, users, strict=True):
        setattr(switches, name, value)


GELU = """
import numpy, torch, triton
import triton.language as tl
from sparse_ops.backends.triton.gelu_kernels import gelu_and_derivative

@triton.jit
def both(x, y, slope, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value, derivative = gelu_and_derivative(tl.load(x + at, mask=at < count, other=0.0), False)
    tl.store(y + at, value, mask=at < count)
    tl.store(slope + at, derivative, mask=at < count)

tiny = torch.tensor([0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1e4, -1e4, 3e38, -3e38])
x = torch.cat((torch.linspace(-13, 13, 200_001), tiny))
y, slope = torch.empty_like(x), torch.empty_like(x)
both[(-(-len(x) // 65536),)](x, y, slope, len(x), BLOCK=65536)
wide = x.double()
below = torch.erfc(-wide * 0.5**0.5) / 2
exact, exact_slope = wide * below, below + wide * torch.exp(-wide * wide / 2) * 0.3989422804014327
usual = wide.abs() < 13
print(((y - exact).abs() / exact.abs().clamp_min(1e-37))[usual].max().item())
print((slope - exact_slope).abs().max().item(), (y - exact)[~usual].abs().nan_to_num(9).max().item())
odd = torch.tensor([float("inf"), float("-inf"), float("nan")])
both[(1,)](odd, y, slope, 3, BLOCK=4)
print(*y[:3].tolist())
"""


def test_gelu_for_16_bits(interpreted):
    relative, slope, far, *odd = interpreted("-c", GELU).split()
    assert float(relative) < 4e-5
    assert float(slope) < 2e-5
    assert float(far) < 1e-40
    assert odd == ["inf", "nan", "nan"]


STRIDED = """
import torch
from sparse_ops.backends.triton.mlp import triton_mlp
from sparse_ops.backends.triton.mlp_backward import triton_mlp_backward
from sparse_ops.conformance_cases import MLPCase

case = MLPCase("strided", (5, 3), channels=8)
found = []
for layout in ("contiguous", "transposed", "strided"):
    values = MLPCase("strided", (5, 3), channels=8, layout=layout).values(torch.float32)
    x, grad = values.pop("x"), values.pop("grad")
    assert layout == "contiguous" or not x.is_contiguous()
    weights = list(values.values())
    *kept, out = triton_mlp(x, weights, case.row_offsets, None, 1e-6, 1e-6, x, torch.float32)
    found.append([out, *triton_mlp_backward(grad, x, weights, case.row_offsets, None, kept, 1e-6, 1e-6)])
for other in found[1:]:
    assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
"""


def test_operators_called_directly_take_any_layout(interpreted):
    interpreted("-c", STRIDED)


RESULTS = {
    "depthwise": {"depthwise_kernel": "out", "depthwise_weight_grad_kernel": "partial"},
    "depthwise_sum": {"depthwise_sum_kernel": "grad_weight grad_bias"},
    "mlp": {
        "layer_norm_kernel": "out mean rstd narrow_w1 narrow_w2",
        "layer_norm_backward_kernel": "grad_x normed partial",
        "gelu_energy_kernel": "partial",
        "grn_scale_kernel": "norms scale",
        "grn_apply_kernel": "out begun",
        "grn_backward_sums_kernel": "partial_product partial_grad partial_b2",
        "grn_backward_scale_kernel": "scale pull grad_gamma grad_beta",
        "grn_backward_apply_kernel": "grad out partial_bias",
    },
    "sums": {"finish_kernel": "of_b1 of_b2 of_gamma of_beta of_norm_weight of_norm_bias"},
}
"""What each kernel writes."""

CHECKED = """
import importlib, sys
import torch
from sparse_ops import registry

class Spoilt:  # a kernel that runs, and then spoils one of its results a little
    def __init__(self, kernel, result):
        self.kernel, self.result = kernel, result

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.kernel[grid](*args, **constants)
            result = dict(zip(self.kernel.arg_names, args))[self.result].view(-1)
            result[result.abs().argmax()] *= 1.01
        return launch

backend, device = registry()["triton"], torch.device("cpu")
print(backend.check(device))
for argument in sys.argv[1:]:
    file, name, result = argument.split(".")
    module = importlib.import_module(f"sparse_ops.backends.triton.{file}_kernels")
    kernel = getattr(module, name)
    setattr(module, name, Spoilt(kernel, result))
    print(argument, *str(backend.check(device)).split())
    setattr(module, name, kernel)
print(backend.check(device), len(backend.unavailable_reason() or ""))
"""


@pytest.mark.slow
@pytest.mark.parametrize("files", [("depthwise", "depthwise_sum"), ("mlp", "sums")], ids="-".join)
def test_its_check_notices_kernels_that_return_wrong_numbers(interpreted, files):
    """One number 1 % off, in each result of each kernel: ``auto`` takes another backend then."""
    kernels = [(file, name, results) for file in files for name, results in RESULTS[file].items()]
    results = [f"{file}.{name}.{result}" for file, name, written in kernels for result in written.split()]
    right, *wrong, right_again = interpreted("-c", CHECKED, *results, timeout=600).splitlines()
    assert (right, right_again) == ("None", "None 0")
    for result, told in zip(results, wrong, strict=True):
        assert told.startswith(f"{result} its kernels fail their check on this device (AssertionError"), told


def test_the_results_of_all_kernels_are_known():
    for file, known in RESULTS.items():
        source = (FOLDER / f"{file}_kernels.py").read_text(encoding="utf-8")
        assert set(re.findall(r"^def (\w+_kernel)\(", source, re.M)) == set(known)


def test_programs_leave_few_lanes_idle():
    """One choice for a side and a width, whatever the size and whatever ran before; a warp has 32 lanes."""
    expected = {40: (2, 16), 48: (2, 16), 80: (1, 32), 96: (1, 32), 160: (1, 32), 352: (1, 32), ANY: (1, 32)}
    assert {channels: program_shape(8, channels) for channels in expected} == expected
    assert [program_shape(side, 384) for side in (8, 4, 2, 1)] == [(1, 32), (1, 64), (1, 64), (1, 64)]
    for channels in (40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 352, 384, 512, 640, 704, 768, 1024, 1408, 2816):
        for side in (8, 4, 2, 1):
            patches, block = program_shape(side, channels)
            assert patches * block % 32 == 0
            assert -(-channels // block) * block <= 1.2 * channels


@pytest.mark.parametrize(("patches", "channels", "side"), [(38, 96, 8), (2432, 40, 8), (2432, 768, 1), (1, 32, 2)])
def test_slices_hold_every_patch_and_fill_a_gpu(patches, channels, side):
    shape = program_shape(side, channels)
    blocks = -(-channels // shape.channels)
    length = slice_length(patches, blocks, 16 // side, shape)
    programs = -(-patches // length) * blocks
    assert length % shape.patches == 0
    assert length >= 16 // side
    assert programs <= launch.PROGRAMS + blocks
    assert programs >= min(launch.PROGRAMS, patches * blocks // max(16 // side, shape.patches)) // 2


def test_usual_widths_have_kernels_of_their_own():
    assert [kernel_width(channels) for channels in (1, 13, 31, 32, 40, 41, 96, 2816)] == [0, 0, 0, 32, 40, 0, 96, 2816]


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack, shared and local memory of a kernel, from the program that Triton brings."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", listing)}


def check_compiles(kernel, architecture: int, types: dict[str, str], constants: dict, warps: int, folder: Path) -> None:
    """Compile for an architecture: no spills, little shared memory. ``types`` are those of the arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    known = {name: value for name, value in constants.items() if name in names}
    source = ASTSource(kernel, signature=signature, constexprs=known, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    used = resources(compiled.asm["cubin"], folder)
    spilled = used["LOCAL"] + used["STACK"]
    # Other versions bring other assemblers, some of which keep a few bytes of some kernels in memory.
    assert spilled <= (0 if triton.__version__.startswith("3.6.") else 64), f"{kernel.__name__} spills {spilled} bytes"
    assert used["SHARED"] <= 16 * 1024
    assert used["REG"] < 255


@pytest.mark.parametrize(("architecture", "dtype", "side", "channels"), COMPILED)
def test_depthwise_kernels_compile_without_spilling(architecture, side, channels, dtype, tmp_path):
    from sparse_ops.backends.triton import depthwise_kernels as kernels

    types = dict.fromkeys(("x", "grad", "out"), f"*{dtype}")
    types |= dict.fromkeys(("weight", "bias", "partial"), "*fp32") | {"neighbours": "*i32"}
    side = tile_side(side, channels)
    patches, block = program_shape(side, channels)
    constants = {"STAGE": Stage(channels, side, 7, reach(7, side)), "PATCHES": patches, "BLOCK": block, "add": None}
    for kernel in (kernels.depthwise_kernel, kernels.depthwise_weight_grad_kernel):
        check_compiles(kernel, architecture, types, constants, 1, tmp_path)


@pytest.mark.parametrize(("architecture", "dtype", "channels"), COMPILED_MLP)
def test_mlp_kernels_compile_without_spilling(architecture, channels, dtype, tmp_path):
    """Features in ``dtype``, parameters and sums in float32."""
    from sparse_ops.backends.triton import mlp_kernels as kernels

    features = ("x", "h", "out", "grad", "grad_x", "incoming", "shortcut", "begun")
    sums = ("weight", "bias", "gamma", "beta", "mean", "rstd", "norms", "scale", "pull", "grad_gamma", "grad_beta")
    sums += ("partial", "partial_bias", "partial_product", "partial_grad", "partial_b2", "w1", "w2", "b1", "b2")
    sums += tuple(name for name in kernels_of("sums").finish_kernel.arg_names if name.startswith("of_"))
    types = dict.fromkeys(features, f"*{dtype}") | dict.fromkeys(sums, "*fp32")
    types |= dict.fromkeys(("normed",), f"*{dtype}")
    types |= dict.fromkeys(("narrow_w1", "narrow_w2"), f"*{dtype}") | {"offsets": "*i64", "eps": "fp32"}
    tiles = {
        norm_tile(channels): [kernels.layer_norm_kernel, kernels.layer_norm_backward_kernel],
        hidden_tile(4 * channels): [
            kernels.gelu_energy_kernel,
            kernels.grn_apply_kernel,
            kernels.grn_backward_sums_kernel,
            kernels.grn_backward_apply_kernel,
        ],
        scale_tile(4 * channels): [kernels.grn_scale_kernel, kernels.grn_backward_scale_kernel],
        finish_tile(4 * channels): [kernels_of("sums").finish_kernel],
    }
    others = {"NARROW": hidden_tile(4 * channels)._replace(width=channels), "CHUNK": COPIED}
    for tile, some in tiles.items():
        for kernel in some:
            check_compiles(kernel, architecture, types, {"TILE": tile, **others}, tile.warps, tmp_path)

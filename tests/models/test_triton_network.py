"""The whole network on the Triton kernels: on a CUDA device where there is one, else interpreted, in another process.

The oracle is the dense masked network in float64; the plain computation is the dense masked network in the same dtype
on the same device.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import (
    RAGGED,
    UNIFORM,
    check_rule,
    images_for,
    largest_relative_error,
    randomise,
    stages_and_gradients,
    tiny_config,
    tiny_fcmae,
)

from convnextv2 import Encoder
from sparse_ops import ActiveSet, DenseGrid, SparseGrid, get_backend, registry
from sparse_ops.oracle import MaskedDenseGrid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
KERNEL = {"kernel_size": 3} if INTERPRETED else {}  # the interpreter takes its time for 7×7
EVERYTHING = torch.ones_like(UNIFORM)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytest.importorskip("triton")
on_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device, and TRITON_INTERPRET is not 1"
)
pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def full_float32():
    """The plain computation without TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def network(**options) -> Encoder:
    encoder = Encoder(tiny_config(**{"patch_size": 16, **KERNEL, **options}))
    randomise(encoder)
    return encoder


def values(encoder, images, grid, visible, dtype):
    """Stages and gradients under autocast to ``dtype``, on the host."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        found = stages_and_gradients(encoder, images, grid, visible)
    return {name: value.detach().float().cpu() for name, value in found.items()}


@on_device
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("visible", [RAGGED, UNIFORM, EVERYTHING], ids=["ragged", "uniform", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_stage_and_gradient_follows_the_rule(dtype, visible, scope):
    encoder, images = network(), images_for(visible)
    oracle_grid = MaskedDenseGrid(visible, 8, scope, torch.float64)
    oracle = stages_and_gradients(encoder.double(), images.double(), oracle_grid, visible)
    encoder, images, there = encoder.float().to(DEVICE), images.to(DEVICE), visible.to(DEVICE)
    plain = values(encoder, images, MaskedDenseGrid(there, 8, scope), there, dtype)
    grid = SparseGrid(ActiveSet.from_mask(~there), "triton", scope)
    found = values(encoder, images, grid, there, dtype)
    # Results are kept in float32 under autocast, but the floor is that of the dtype computed in.
    check_rule({name: value.to(dtype) for name, value in found.items()}, plain, oracle)


@on_device
def test_nothing_masked_is_the_dense_network():
    encoder, images = network().to(DEVICE), images_for(EVERYTHING).to(DEVICE)
    there = EVERYTHING.to(DEVICE)
    dense = values(encoder, images, DenseGrid(len(images)), there, torch.float32)
    sparse = values(encoder, images, SparseGrid(ActiveSet.from_mask(~there), "triton"), there, torch.float32)
    assert largest_relative_error(sparse, dense) < 1e-4


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_autoencoder_and_its_gradients(dtype):
    """Loss and gradients with all patches predicted, and with those of the masked ones only."""
    images = images_for(UNIFORM)
    mask = (~UNIFORM).float().flatten(1)
    exact = tiny_fcmae(torch.float64, encoder=KERNEL)
    loss = exact(images.double(), mask).loss
    loss.backward()
    model = tiny_fcmae(backend="triton", encoder=KERNEL).to(DEVICE)
    for return_pred in (True, False):
        model.zero_grad()
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            found = model(images.to(DEVICE), mask.to(DEVICE), return_pred=return_pred).loss
        assert found.dtype == torch.float32
        tolerance = 1e-4 if dtype == torch.float32 else 64 * torch.finfo(dtype).eps
        assert abs(found.item() / loss.item() - 1) < tolerance
        found.backward()
        for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
            assert parameter.grad.dtype == torch.float32
            difference = (parameter.grad.cpu().double() - other.grad).norm() / other.grad.norm().clamp_min(1e-12)
            assert difference < 2 * tolerance, name


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bit_identical(dtype):
    encoder, images = network().to(DEVICE), images_for(RAGGED).to(DEVICE)
    there = RAGGED.to(DEVICE)
    first, second = (
        values(encoder, images, SparseGrid(ActiveSet.from_mask(~there), "triton"), there, dtype) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_without_a_graph_break(dtype):
    encoder, images = network(depths=(1, 1, 1, 1)).to(DEVICE), images_for(UNIFORM).to(DEVICE)
    mask, kernels = (~UNIFORM).flatten(1).to(DEVICE), get_backend("triton")

    def loss(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        active = ActiveSet.from_mask(mask, (2, 4), keep=4)
        return encoder(images, SparseGrid(active, kernels)).square().mean()

    torch._dynamo.reset()
    # Inductor lays out memory by what operators promise; once is enough in the interpreter.
    inductor = not INTERPRETED or dtype == torch.float32
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if inductor else "aot_eager")
    results = []
    for function in (loss, compiled):
        encoder.zero_grad()
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            value = function(images, mask)
        value.backward()
        results.append({"loss": value.detach(), **{n: p.grad.clone() for n, p in encoder.named_parameters()}})
    assert largest_relative_error(results[1], results[0]) < (1e-4 if dtype == torch.float32 else 3e-2)


STEPS = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from convnextv2 import FCMAE, EncoderConfig, FCMAEConfig
from sparse_ops.backends.triton import backend as kernels, launch

class Driver:
    "What Triton asks of a GPU's driver before it compiles."

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

class Backend(kernels.TritonBackend):
    def rejects(self, device, dtype, kernel_size):
        return None

    def warm_up(self, *args):
        super().warm_up(*args)
        told()

def told():
    print(*compiled)
    compiled.clear()

dtype, compiled = getattr(torch, sys.argv[1]), []
triton.runtime.driver.set_active(Driver())
triton.knobs.runtime.jit_post_compile_hook = lambda **facts: compiled.append(facts["fn"].name)
# A width without kernels of its own, and one with: each is compiled once.
encoder = EncoderConfig(depths=(1, 1, 1, 1), dims=(16, 16, 16, 16), kernel_size=3)
model = FCMAE(FCMAEConfig(encoder, img_size=(64, 96), decoder_dim=40))
model.backend = Backend()

def step(batch, mask_ratio=None):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(torch.randn(batch, 3, 64, 96), mask_ratio=mask_ratio, return_pred=batch > 1).loss
    loss.backward()

launch._only_compiling = True
for size in ((1, None), (2, 0.2), (3, 0.5), (16, None)):
    step(*size)
    told()
"""


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_compiles_what_it_needs_beforehand_and_once(dtype, tmp_path):
    """Kernels are compiled for a GPU that is not there and not launched; sizes of batch and mask make no new ones."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, dtype],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    encoder, decoder, *later = (line.split() for line in done.stdout.splitlines())
    assert {"depthwise_kernel", "depthwise_weight_grad_kernel", "layer_norm_backward_kernel"} < set(encoder)
    assert len(decoder) >= 9
    assert later == [[]] * (4 + 2 * 3)


@pytest.mark.slow
@pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(),
    reason="the tests above run in this process, on a CUDA device or interpreted",
)
def test_the_tests_of_this_file_pass_in_the_interpreter(interpreted_tests):
    some = "nothing_masked or ragged-image or (float32 and compiled)"
    narrow = "bfloat16 and (uniform-batch or autoencoder or identical)"
    one = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no processes that import torch to compile some small functions
    assert " passed" in interpreted_tests(Path(__file__), f"{some} or ({narrow})", 900, **one)
    assert registry()["triton"].unavailable_reason() is not None

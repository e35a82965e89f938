"""A training step never waits for the device: no value is read back, and nothing is copied from the host.

Without a GPU the step runs on the meta device, whose tensors have no values: reading one raises, and so do functions
that make tensors from Python numbers or index with lists, which copy from the host.
"""

import pytest
import torch
from model_helpers import UNIFORM, tiny_fcmae
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_ops import ActiveSet, registry
from sparse_ops.backends.triton.backend import TritonBackend

FROM_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray}
INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class NoHostData(TorchFunctionMode):
    """Raises where Python data becomes a tensor of another device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FROM_HOST and torch.device((kwargs or {}).get("device") or "cpu").type != "cpu":
            raise AssertionError(f"{func.__name__}: data from the host")
        if func in INDEXING and args[0].device.type != "cpu":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                raise AssertionError("an index that is a list: data from the host")
        return func(*args, **(kwargs or {}))


class NoCopies(TorchDispatchMode):
    """Raises where an operation takes or makes tensors of the host and of another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.dim()]
        if len({t.device.type for t in tensors}) > 1:
            raise AssertionError(f"{func}: tensors of {sorted({t.device.type for t in tensors})}")
        return out


class Anywhere(TritonBackend):
    """The kernels' fake implementations serve the meta device."""

    name = "triton on meta"

    def rejects(self, device, dtype, kernel_size):
        return None


def step(model, images: torch.Tensor, return_pred: bool) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(images, return_pred=return_pred).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("return_pred", [False, True])
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("backend", [Anywhere(), registry()["reference"]], ids=["triton", "reference"])
def test_a_step_does_not_wait_for_the_device(backend, scope, return_pred):
    model = tiny_fcmae(grn_scope=scope).to("meta")
    model.backend = backend
    with NoHostData(), NoCopies():
        step(model, torch.empty(3, 3, 32, 64, device="meta"), return_pred)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: torch.tensor([0, 1], device=x.device),
        lambda x: x[[0, 1]],
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x + torch.ones(3).to(x.device),
        lambda x: ActiveSet.from_mask(x.view(1, 1, 3)),
    ],
)
def test_the_check_catches(wrong):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoHostData(), NoCopies():
        wrong(torch.empty(3, device="meta"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_does_not_wait_on_cuda(dtype):
    model = tiny_fcmae(backend="triton").cuda()
    images = torch.randn(*UNIFORM.shape[:1], 3, 32, 64, device="cuda")

    def steps() -> None:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            step(model, images, return_pred=False)

    steps()  # the kernels are tuned, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")

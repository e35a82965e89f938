"""Operands of any layout in memory, given to a backend itself: the same result as contiguous ones."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_ops import ActiveSet, registry
from sparse_ops.functional import depthwise_conv

LAYOUTS = ("transposed", "strided", "expanded", "offset")
NAMES = ("x", "weight", "bias", "grad")
AVAILABLE = [name for name, backend in registry().items() if backend.unavailable_reason() is None]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides; of "expanded" its first slice, again and again."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if layout == "offset":
        return torch.cat((tensor.new_full((1,), 7.0), tensor.flatten()))[1:].view(tensor.shape)
    return torch.stack((tensor, torch.full_like(tensor, -1)), dim=-1)[..., 0]


def results(backend, active: ActiveSet, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> dict[str, Tensor]:
    found = {
        "depthwise": backend.depthwise(x, weight, bias, active, reverse_taps=False),
        "reversed": backend.depthwise(grad, weight, None, active, reverse_taps=True),
        "weight": backend.depthwise_weight_grad(x, grad, active, weight.shape[-1]),
        "grads": backend.depthwise_grads(x, grad, active, weight)[0],
    }
    leaves = [operand.detach().requires_grad_() for operand in (x, weight, bias)]
    out = depthwise_conv(*leaves, active, backend)
    return found | dict(zip(("out", "x", "w", "b"), (out, *torch.autograd.grad(out, leaves, grad)), strict=True))


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_results(name, layout):
    active = ActiveSet.from_mask(torch.tensor([[[0.0, 1, 0], [1, 0, 0]]]), side=2)
    generator = torch.Generator().manual_seed(0)
    shapes = ((active.num_cells, 5), (5, 1, 3, 3), (5,), (active.num_cells, 5))
    operands = [torch.randn(shape, generator=generator) for shape in shapes]
    for place, operand in enumerate(operands):
        odd = laid_out(operand, layout)
        given, plain = list(operands), list(operands)
        given[place], plain[place] = odd, odd.contiguous()
        expected = results(registry()[name], active, *plain)
        for what, found in results(registry()[name], active, *given).items():
            assert torch.equal(found, expected[what]), f"{what} with {NAMES[place]} {layout}"


@pytest.mark.slow
@pytest.mark.skipif("triton" in AVAILABLE, reason="the tests above run triton in this process")
def test_layouts_do_not_change_results_of_triton(interpreted_tests):
    pytest.importorskip("triton")
    # This test, which is chosen too, is skipped there.
    told = interpreted_tests(Path(__file__), "triton", 300, REQUIRE_BACKENDS="")
    assert f"{len(LAYOUTS)} passed" in told

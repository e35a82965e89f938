"""How the kernels cut their work must not depend on the number of threads: results are the same bits for any."""

import pytest
import torch

from sparse_ops import ActiveSet, registry
from sparse_ops.backends.cpu.operators import cpu_gelu_grn, cpu_gelu_grn_backward, cpu_layer_norm_backward

CPU = registry()["cpu"]

pytestmark = pytest.mark.skipif(CPU.unavailable_reason() is not None, reason=str(CPU.unavailable_reason()))


@pytest.mark.parametrize("side", [8, 4, 2, 1])
def test_threads_do_not_change_a_bit(side):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    active = ActiveSet.from_mask((torch.rand(2, 7, 7, generator=generator) < 0.6).float(), side=side)
    rows, channels = active.num_cells, 40
    x, grad, weight, bias = normal(rows, channels), normal(rows, channels), normal(channels, 1, 7, 7), normal(channels)
    h, grad_h, gamma, beta = normal(rows, 64), normal(rows, 64), normal(64), normal(64)
    expected = None
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        y, y_again, grad_of_h = torch.empty_like(h), torch.empty_like(h), grad_h.clone()
        norms = cpu_gelu_grn(h, beta, gamma, beta, active.row_offsets, 1e-6, y)
        found = [
            CPU.depthwise(x, weight, bias, active, reverse_taps=False),
            CPU.depthwise(x, weight, None, active, reverse_taps=True),
            CPU.depthwise_weight_grad(x, grad, active, 7),
            y,
            norms,
            *cpu_gelu_grn_backward(grad_of_h, h, beta, gamma, beta, norms, active.row_offsets, 1e-6, y_again),
            grad_of_h,
            y_again,
            *cpu_layer_norm_backward(
                grad, x, *(x[:, :2].T.contiguous()[:, :, None]), bias.flip(0), bias, torch.empty_like(x)
            ),
        ]
        expected = expected or found
        for number, (first, other) in enumerate(zip(expected, found, strict=True)):
            assert torch.equal(first, other), f"result {number} with {threads} threads"

"""What the depthwise kernels launch and what they read, counted in Triton's interpreter at stage 1 of tiny."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

COUNTED = """
import json, torch
from counts import counting
from sparse_ops import ActiveSet, get_backend
from sparse_ops.functional import depthwise_conv

def masks(images):  # 19 of 49 patches are visible
    torch.manual_seed(0)
    return ActiveSet.from_mask((torch.rand(images, 49).argsort(1) >= 19).float(), (7, 7), keep=19)

def reads(active):  # a cell under a tap is read once; what the nine neighbours of a patch have for one
    area = torch.tensor([9, 24, 9, 24, 64, 24, 9, 24, 9])
    return ((active.patch_neighbours(7) >= 0) * area).sum().item() / active.num_cells

active = masks(1)
backend, channels = get_backend("triton"), 32  # a third of tiny's, which count alike
x = torch.randn(active.num_cells, channels, dtype=torch.bfloat16, requires_grad=True)
weight, bias = torch.randn(channels, 1, 7, 7, requires_grad=True), torch.randn(channels, requires_grad=True)
backend.prepare(active, 7)
with counting() as forward, torch.autocast("cpu", torch.bfloat16):
    out = depthwise_conv(x, weight, bias, active, backend)
grad = torch.ones_like(out)
with counting() as backward:
    out.backward(grad)
numbers = x.numel()
counts = [[launch.name, dict(launch.read), dict(launch.written)] for launch in (*forward, *backward)]
print(json.dumps([len(forward), numbers, reads(active), reads(masks(512)), counts]))
"""


@pytest.mark.slow
def test_launches_and_bytes_at_stage_1_of_tiny(interpreted):
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    told = interpreted("-c", COUNTED, timeout=600, PYTHONPATH=path)
    forward, numbers, reads, usual, launches = json.loads(told)
    assert forward == 1
    assert [name for name, _, _ in launches] == [
        *["depthwise_kernel"] * 2,
        *["depthwise_weight_grad_kernel", "depthwise_sum_kernel"],
    ]
    for _, read, written in launches[:2]:
        assert read["x"] / written["out"] == pytest.approx(reads), "visible cells read for each written"
        assert written["out"] == 2 * numbers
    assert 1 < usual < 1.7
    summed = launches[2:]
    assert summed[0][1]["x"] / (2 * numbers) == pytest.approx(reads)
    assert summed[0][1]["grad"] == 2 * numbers
    assert summed[1][2] == {"grad_weight": 32 * 49 * 4, "grad_bias": 32 * 4}
    total = sum(sum(read.values()) + sum(written.values()) for _, read, written in summed)
    assert total / numbers < 12, "bytes"

"""What a block launches on a GPU, counted in Triton's interpreter, in a process of its own; no kernel is executed."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

COUNTED = """
import json, sys, torch
from counts import block_counts
from convnextv2.models.masking import keep_count, random_mask
from sparse_ops import ActiveSet

active = ActiveSet.from_mask(random_mask(1, 49, 0.6), (7, 7), keep=keep_count(49, 0.6))
for stage in range(1, 5):
    stream = torch.float32 if stage == 1 else torch.bfloat16
    found = block_counts("convnextv2_tiny", stage, active, torch.bfloat16, stream, execute=False)
    print(json.dumps([(launch.operator, launch.name) for launch in (*found.forward, *found.backward)]))
    active = active.down() if active.side > 1 else active
"""


def test_a_block_launches_few_kernels(interpreted):
    """tiny, bfloat16 under autocast, both ways: 20 in stage 1 and 19 elsewhere, casts and sums of torch included."""
    path = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    stages = [json.loads(line) for line in interpreted("-c", COUNTED, PYTHONPATH=path).splitlines()]
    assert [len(launches) for launches in stages] == [20, 19, 19, 19]
    for launches in stages:
        kernels = [name for operator, name in launches if operator == "triton_mlp"]
        assert kernels[-1] in ("aten.addmm_", "aten.mm")  # the projection, added to the residual in place
        names = [name for _, name in launches]
        assert names.count("finish_kernel") == names.count("depthwise_sum_kernel") == 1
        assert names.count("depthwise_kernel") == 2
        assert all(operator for operator, _ in launches), launches

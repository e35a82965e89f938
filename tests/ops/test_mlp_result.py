"""The pointwise half of a block where nothing is kept for a backward pass, and the block's input added to it."""

from __future__ import annotations

import pytest
import torch

from sparse_ops import registry
from sparse_ops.backends.cpu import maps
from sparse_ops.backends.cpu.backend import BACKEND
from sparse_ops.conformance_cases import MLPCase
from sparse_ops.conformance_maps import RESULT_CASES, check_result_conformance, result_call
from sparse_ops.workspace import Workspace

pytestmark = pytest.mark.skipif(registry()["cpu"].unavailable_reason() is not None, reason="no compiled kernels")

(MAPS,) = (case for case in RESULT_CASES if case.name == "maps")


@pytest.mark.parametrize("case", RESULT_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conformance(case, dtype):
    check_result_conformance(BACKEND, case, dtype)


@pytest.mark.parametrize("change", [lambda out, _: out * 1.0001, lambda out, residual: out + (residual is not None)])
def test_a_wrong_result_is_caught(change):
    class Wrong(type(BACKEND)):
        def mlp_result(self, call, residual=None):
            return change(super().mlp_result(call, residual), residual)

    with pytest.raises(AssertionError, match="result of maps"):
        check_result_conformance(Wrong(), MAPS, torch.float32)


@pytest.mark.parametrize("case", RESULT_CASES, ids=str)
def test_neither_threads_nor_memory_change_a_bit(case, monkeypatch):
    call = result_call(case, torch.float32)
    torch.set_num_threads(1)
    expected = BACKEND.mlp_result(call)
    for threads in (2, 3, 16):
        torch.set_num_threads(threads)
        assert torch.equal(BACKEND.mlp_result(call), expected)
    monkeypatch.setattr(maps, "HIDDEN_BYTES", 1)  # one image at a time
    assert torch.equal(BACKEND.mlp_result(call._replace(workspace=Workspace())), expected)


def test_an_image_does_not_depend_on_its_neighbours():
    call = result_call(MAPS, torch.float32)
    alone = call._replace(x=call.x[196:], row_offsets=torch.tensor([0, 196]))
    assert torch.equal(BACKEND.mlp_result(call)[196:], BACKEND.mlp_result(alone))


def test_no_rows():
    call = result_call(MLPCase("none", (0, 0)), torch.float32)
    assert BACKEND.mlp_result(call).shape == (0, 8)
    assert BACKEND.mlp_result(call._replace(row_offsets=torch.tensor([0]))).shape == (0, 8)


def test_nan_stays_in_its_image():
    call = result_call(MAPS, torch.float32)
    call.x[3, 7] = float("nan")
    out = BACKEND.mlp_result(call)
    assert out[:196].isnan().all()
    assert not out[196:].isnan().any()

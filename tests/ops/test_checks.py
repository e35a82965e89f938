"""What reaches a kernel is what it can compute with: anything else is refused before, by name."""

import os
import subprocess
import sys

import pytest
import torch

from sparse_ops import ActiveSet, convnext_mlp, get_backend
from sparse_ops.pointwise import MLPWeights

ROWS = 20


def weights(dtype: torch.dtype = torch.float32, device: str = "cpu") -> MLPWeights:
    return MLPWeights(*(torch.randn(*shape, dtype=dtype, device=device) for shape in MLPWeights.shapes(8, 32)))


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        (torch.tensor([0, ROWS], dtype=torch.int32), "int64"),
        (torch.tensor([0.0, ROWS]), "int64"),
        (torch.tensor([[0, ROWS]]), "int64"),
        (torch.tensor([], dtype=torch.int64), "int64"),
        (torch.tensor([0, 200_000_000]), "rise from 0 to 20"),
        (torch.tensor([0, 10]), "rise from 0 to 20"),
        (torch.tensor([5, ROWS]), "rise from 0 to 20"),
        (torch.tensor([0, 15, 5, ROWS]), "rise from 0 to 20"),
        (torch.tensor([-5, ROWS]), "rise from 0 to 20"),
    ],
)
def test_groups_that_are_none_are_refused(offsets, said):
    with pytest.raises(ValueError, match=said):
        convnext_mlp(torch.randn(ROWS, 8), weights(), offsets, get_backend("cpu"))


@pytest.mark.parametrize(
    ("dtype", "weights_dtype", "device"),
    [
        (torch.float32, torch.float64, "cpu"),
        (torch.float64, torch.float32, "cpu"),
        (torch.float16, torch.float16, "cpu"),
        (torch.bfloat16, torch.bfloat16, "cpu"),
        (torch.float32, torch.float32, "meta"),
    ],
)
def test_numbers_that_no_kernel_is_for_are_refused(dtype, weights_dtype, device):
    x, offsets = torch.randn(ROWS, 8, dtype=dtype, device=device), torch.tensor([0, ROWS], device=device)
    with pytest.raises(ValueError, match="'cpu' fuses no MLP of"):
        convnext_mlp(x, weights(weights_dtype, device), offsets, get_backend("cpu"))


def test_weights_of_several_kinds_are_refused():
    mixed = weights()._replace(gamma=torch.ones(32, dtype=torch.float64))
    with pytest.raises(ValueError, match="weights of one dtype on one device"):
        convnext_mlp(torch.randn(ROWS, 8), mixed, torch.tensor([0, ROWS]), get_backend("cpu"))


def test_empty_groups_and_no_rows_are_served():
    backend = get_backend("cpu")
    x, own = torch.randn(ROWS, 8), weights()
    expected = convnext_mlp(x, own, torch.tensor([0, 10, ROWS]), backend)
    torch.testing.assert_close(convnext_mlp(x, own, torch.tensor([0, 10, 10, ROWS]), backend), expected)
    assert convnext_mlp(x[:0], own, torch.tensor([0, 0]), backend).shape == (0, 8)


def test_an_unknown_instruction_set_is_no_silent_choice():
    code = "from sparse_ops import get_backend; get_backend('cpu')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "SPARSE_OPS_CPU": "AVX2"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "SPARSE_OPS_CPU=AVX2 is none of baseline, avx2, avx512" in done.stderr


def test_grids_of_negative_size_are_refused():
    with pytest.raises(ValueError, match="-2×-2"):
        ActiveSet.full(1, (-2, -2))
    with pytest.raises(ValueError, match="-3×-3"):
        ActiveSet.from_mask(torch.zeros(2, 9), (-3, -3))
    with pytest.raises(ValueError, match="must be odd, got 4"):
        ActiveSet.full(1, (3, 3)).cell_neighbours(4)


def test_an_active_set_that_was_used_for_inference_can_be_trained_on():
    from convnextv2 import Encoder, EncoderConfig
    from sparse_ops import SparseGrid

    encoder, images = Encoder(EncoderConfig((1, 1, 1, 1), (8, 8, 16, 16))), torch.randn(2, 3, 96, 96)
    grid = SparseGrid(ActiveSet.from_mask(torch.tensor([[1, 0, 0, 1, 0, 1, 0, 1, 1], [0] * 9]), (3, 3)))
    with torch.inference_mode():
        encoder(images, grid)
    encoder(images, grid).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())

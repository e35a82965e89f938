"""The short way past torch's dispatcher: what it leans on, and what happens without it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_ops.backends import _operators


@torch.library.custom_op("sparse_ops_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


class Calls:
    """An operator that tells whether it was dispatched or called past torch."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __call__(self, *args):
        self.log.append("dispatched")

    def _init_fn(self, *args):
        self.log.append("bare")


def test_private_names_of_torch_are_there():
    """Were torch to drop one, operators would still run, each some microseconds slower: this test tells."""
    assert _operators._profiling is torch.autograd._profiler_enabled
    assert _operators._dispatch_mode is torch.utils._python_dispatch._get_current_dispatch_mode
    assert twice._init_fn(torch.ones(2)).tolist() == [2, 2]
    assert torch.equal(_operators.run(twice, torch.ones(2)), twice(torch.ones(2)))


@pytest.mark.parametrize("missing", ["_profiling", "_dispatch_mode", "_init_fn"])
def test_without_one_of_them_operators_are_dispatched(missing, monkeypatch):
    operator, x = Calls(), torch.ones(2)
    _operators.run(operator, x)
    if missing == "_init_fn":
        monkeypatch.delattr(Calls, "_init_fn")
    else:
        monkeypatch.setattr(_operators, missing, None)
    _operators.run(operator, x)
    assert operator.log == ["bare", "dispatched"]


def test_what_watches_sees_the_operator():
    operator, x = Calls(), torch.ones(2)
    with torch.profiler.profile():
        _operators.run(operator, x)
    with TorchDispatchMode():
        _operators.run(operator, x)
    _operators.run(operator, torch.nn.Parameter(x))
    assert operator.log == ["dispatched"] * 3

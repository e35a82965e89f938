import importlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_ops import (
    ActiveSet,
    BackendUnavailableError,
    MLPWeights,
    SparseGrid,
    convnext_mlp,
    get_backend,
    registry,
    resolve_backend,
)
from sparse_ops.__main__ import report

ROOT = Path(__file__).parents[2]
registry_module = importlib.import_module("sparse_ops.registry")  # the package's attribute of that name is the function


class Broken(type(get_backend("reference"))):
    name = "broken"
    summary = "needs what nobody has"
    priority = 1000

    def unavailable_reason(self) -> str | None:
        return "unobtainium is not installed; pip install unobtainium"


@pytest.fixture
def with_broken(monkeypatch):
    """A registry whose most preferred backend is unavailable."""
    backends = {"broken": Broken(), **registry()}
    registry_module._auto.cache_clear()
    monkeypatch.setattr(registry_module, "registry", lambda: backends)
    monkeypatch.setattr("sparse_ops.__main__.registry", lambda: backends)
    yield backends
    registry_module._auto.cache_clear()


def test_registry_is_ordered_by_priority():
    priorities = [found.priority for found in registry().values()]
    assert priorities == sorted(priorities, reverse=True)
    assert all(found.name == name and found.summary for name, found in registry().items())


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"unknown backend 'tpu'; choose auto or one of .*reference"):
        get_backend("tpu")
    with pytest.raises(ValueError, match="unknown backend"):
        SparseGrid(ActiveSet.full(1, (1, 1)), "tpu")


def test_unavailable_backend_raises_its_reason(with_broken):
    with pytest.raises(BackendUnavailableError, match="pip install unobtainium"):
        get_backend("broken")
    with pytest.raises(BackendUnavailableError, match="pip install unobtainium"):
        SparseGrid(ActiveSet.full(1, (1, 1)), "broken")


def test_auto_skips_the_unavailable_and_logs_its_choice_once(with_broken, caplog):
    with caplog.at_level(logging.INFO, logger="sparse_ops"):
        chosen = [resolve_backend("auto", torch.device("cpu")) for _ in range(3)]
    expected = next(
        b
        for b in with_broken.values()
        if b.unavailable_reason() is None and b.rejects(torch.device("cpu"), torch.float32, 7) is None
    )
    assert chosen == [expected] * 3
    warning, choice = caplog.records
    assert warning.levelno == logging.WARNING
    assert "broken is not available: unobtainium is not installed" in warning.getMessage()
    assert choice.getMessage() == f"backend auto: chose {expected.name} for cpu, torch.float32, kernel size 7"


class Wrong(Broken):
    """Available, but its results are not right."""

    def unavailable_reason(self):
        return None

    def check(self, device):
        return f"2 + 2 = 5 on {device}"


def test_auto_passes_over_a_backend_whose_results_are_wrong(monkeypatch, caplog):
    registry_module._auto.cache_clear()
    caplog.set_level(logging.INFO, logger="sparse_ops.registry")
    backends = {"wrong": Wrong(), "reference": get_backend("reference")}
    monkeypatch.setattr(registry_module, "registry", lambda: backends)
    assert resolve_backend("auto", torch.device("cpu")).name == "reference"
    assert "2 + 2 = 5 on cpu" in caplog.text
    registry_module._auto.cache_clear()


def test_auto_without_any_backend_raises(monkeypatch):
    registry_module._auto.cache_clear()
    monkeypatch.setattr(registry_module, "registry", lambda: {"broken": Broken()})
    with pytest.raises(BackendUnavailableError, match=r"no backend serves torch\.float32 and kernel size 7 on cpu"):
        resolve_backend("auto", torch.device("cpu"))
    registry_module._auto.cache_clear()


class ThreeOnly(type(get_backend("reference"))):
    """Faster than all others, for float64 and kernels of 3."""

    name, priority = "three", 1000

    def rejects(self, device, dtype, kernel_size):
        return None if (dtype, kernel_size) == (torch.float64, 3) else "another input"


def test_auto_asks_for_what_will_run(monkeypatch):
    three = ThreeOnly()
    backends = {"three": three, **registry()}
    monkeypatch.setattr(registry_module, "registry", lambda: backends)
    registry_module._auto.cache_clear()
    cpu = torch.device("cpu")
    assert resolve_backend("auto", cpu, torch.float64, 3) is three
    assert resolve_backend("auto", cpu, torch.float64, 7) is not three
    grid = SparseGrid(ActiveSet.full(1, (1, 1), 2))
    asked = []
    monkeypatch.setattr(three, "depthwise", lambda x, *rest, **options: asked.append(x.dtype) or x)
    small, usual = (torch.nn.Conv2d(2, 2, k, padding=k // 2, groups=2).double() for k in (3, 7))
    grid.depthwise(small, torch.zeros(4, 2).double())
    grid.depthwise(usual, torch.zeros(4, 2).double())
    grid.depthwise(usual.float(), torch.zeros(4, 2))
    assert asked == [torch.float64]
    assert grid.native(torch.zeros(1).double(), 3).backend is three
    # A kernel that no fast backend has: auto takes the one that has it.
    assert resolve_backend("auto", cpu, torch.float32, 9).rejects(cpu, torch.float32, 9) is None
    registry_module._auto.cache_clear()


def test_a_named_backend_is_the_one_that_runs(monkeypatch):
    """No silent fallback: what the named backend raises reaches the caller."""
    reference = get_backend("reference")

    def fail(*_args, **_kwargs):
        raise RuntimeError("kernel failed")

    monkeypatch.setattr(reference, "depthwise", fail)
    grid = SparseGrid(ActiveSet.full(1, (1, 1)), "reference")
    with pytest.raises(RuntimeError, match="kernel failed"):
        grid.depthwise(torch.nn.Conv2d(2, 2, 7, padding=3, groups=2), torch.zeros(64, 2))


def test_a_backend_object_is_taken_as_it_is():
    mine = Broken()
    assert resolve_backend(mine, torch.device("cpu")) is mine


def test_backends_without_kernels_for_the_mlp_say_so():
    reference = get_backend("reference")
    x = torch.zeros(1, 1)
    assert not reference.fuses_mlp(torch.device("cpu"), torch.float32, torch.float32)
    with pytest.raises(NotImplementedError, match="'reference' has no fused"):
        convnext_mlp(x, MLPWeights(*x, *x, x, *x, *x, *x, x, *x), torch.tensor([0, 1]), reference)


def test_report_lists_backends_reasons_and_the_choice(with_broken):
    text = report()
    assert "broken" in text
    assert "why: unobtainium is not installed" in text
    assert f"auto on cpu: {resolve_backend('auto', torch.device('cpu')).name}" in text
    for name, found in registry().items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert ("unavailable" in line) == (found.unavailable_reason() is not None)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, *code.split(" ", 1)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_module_prints_the_report():
    printed = run("-m sparse_ops")
    assert "reference" in printed
    assert "auto on cpu: " in printed


def test_imports_stay_light():
    """Importing either package imports no optional one, and sparse_ops imports torch alone."""
    optional = {
        "MinkowskiEngine",
        "triton",
        "matplotlib",
        "sklearn",
        "timm",
        "accelerate",
        "torchvision",
        "jsonargparse",
    }
    code = (
        "import sys, torch; before = set(sys.modules); import {0}, sparse_ops.conformance; "
        "print(*sorted(n for n in set(sys.modules) - before if '.' not in n))"
    )
    printed = {name: set(run(f"-c {code.format(name)}").split()) for name in ("sparse_ops", "convnextv2")}
    assert printed["sparse_ops"] >= {"sparse_ops"}
    assert not printed["sparse_ops"] & (optional | {"convnextv2", "numpy"})
    assert printed["convnextv2"] >= {"convnextv2", "sparse_ops"}
    assert not printed["convnextv2"] & optional

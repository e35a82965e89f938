"""Shared fixtures: a tiny architecture, folders of images, and scripts run in this process."""

from __future__ import annotations

import getpass
import importlib
import itertools
import os
import random
import re
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import setuptools
import torch
from blank_pictures import blank, render
from matplotlib.figure import Figure
from PIL import Image

from convnextv2 import EncoderConfig
from sparse_ops import registry

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
INTERPRETING = Path(__file__).with_name("interpreting.py")

# What torch compiled for one instruction set it also takes for another, which then computes something else.
COMPILED = f"torchinductor_{getpass.getuser()}_{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / COMPILED))


def slow_first(slow: list[T], fast: list[T]) -> list[T]:
    """Slow tests before others in each of the equal parts that pytest-xdist gives its processes at first: what one of
    them takes over from another is of the end of its part, so that none ends with a long one."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ordered, rest = list[T](), iter(fast)
    for worker in range(workers):
        size = (len(slow) + len(fast) - len(ordered)) // (workers - worker)
        ordered += slow[worker::workers]
        ordered += itertools.islice(rest, max(0, size - len(slow[worker::workers])))
    return [*ordered, *rest]


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Cases of a test that run on a CUDA device are part of the suite that ``-m cuda`` selects; slow tests come first.

    What slow tests cover is not measured: measuring takes half as long again, and the others cover nearly as much.
    ``TEST_SHARD=2/8`` leaves every eighth of the tests selected, beginning with the second.
    """
    measured = config.pluginmanager.hasplugin("_cov")
    for item in items:
        if measured and item.get_closest_marker("slow"):
            item.add_marker("no_cover")
        parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
        if any(isinstance(value, str) and value == "cuda" for value in parameters):
            item.add_marker("cuda")
    yield
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = slow_first(slow, [item for item in items if not item.get_closest_marker("slow")])
    if shard := os.environ.get("TEST_SHARD"):
        number, count = map(int, shard.split("/"))
        items[:] = items[number - 1 :: count]


REQUIRED = os.environ.get("REQUIRE_BACKENDS", "").split()
"""Backends that must be there, as ``make test`` asks; with any named, a test is skipped for want of a device only."""
DEVICE = re.compile(r"\b(CUDA|GPU|device)\b")


def pytest_sessionstart() -> None:
    """Nothing runs without the backends that are required: their tests would drop out in silence."""
    reasons = {name: registry()[name].unavailable_reason() for name in REQUIRED}
    missing = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if missing:
        raise pytest.UsageError("\n".join(["REQUIRE_BACKENDS names backends that cannot run here", *missing]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs MinkowskiEngine where it is not there."""
    if item.get_closest_marker("minkowski"):
        reason = registry()["minkowski"].unavailable_reason()
        if reason is not None:
            pytest.skip(reason)


def names_a_device(report: pytest.TestReport | pytest.CollectReport) -> bool:
    """False for what is skipped and need not be: the skip is then a failure."""
    if not (REQUIRED and report.skipped and isinstance(report.longrepr, tuple)):
        return True
    reason = report.longrepr[2]
    return bool(DEVICE.search(reason)) or ("minkowski" not in REQUIRED and "MinkowskiEngine" in reason)


def fail_unless_it_names_a_device(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not names_a_device(report):
        reason = report.longrepr[2]  # type: ignore[index]  # a skip's is (file, line, reason)
        report.outcome = "failed"
        report.longrepr = (
            f"{report.nodeid} is skipped, where REQUIRE_BACKENDS is set, not for want of a device: {reason}"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[pytest.TestReport]:
    report = yield
    fail_unless_it_names_a_device(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[pytest.CollectReport]:
    report = yield
    fail_unless_it_names_a_device(report)
    return report


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and uses at most two threads."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # timm draws from it
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def not_rendered() -> Iterator[None]:
    """Pictures are blank, but for those of other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", blank)
        yield


@pytest.fixture(autouse=True)
def rendered(request: pytest.FixtureRequest) -> Iterator[None]:
    """But for those of tests that are marked ``pictures``, too."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: the test's is taken back in the test's order
        if request.node.get_closest_marker("pictures"):
            patch.setattr(Figure, "savefig", render)
        yield


@pytest.fixture
def tiny_encoder() -> EncoderConfig:
    return EncoderConfig(depths=(1, 1, 1, 1), dims=(8, 16, 16, 24), patch_size=16)


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of small noisy images: ``image_folder({"red": 3, "green": 3}, name="data")``.

    The class "" stands for images directly in the folder.
    """

    def make(classes: dict[str, int], name: str = "data", size: tuple[int, int] = (40, 30)) -> Path:
        rng = np.random.default_rng(0)
        root = tmp_path / name
        root.mkdir(parents=True)
        for number, (label, count) in enumerate(classes.items()):
            (root / label).mkdir(exist_ok=True)
            for index in range(count):
                pixels = rng.integers(0, 60, (size[1], size[0], 3)).astype(np.uint8)
                pixels[..., number % 3] += 150
                Image.fromarray(pixels).save(root / label / f"{index:03d}.png")
        return root

    return make


@pytest.fixture
def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **said: found.update(said))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return found


class ScriptResult(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., ScriptResult]:
    """Runs ``scripts/<name>.py`` as the command line would, in this process."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def run(name: str, *arguments: object) -> ScriptResult:
        cli = importlib.import_module("convnextv2.commands._cli")
        main = importlib.import_module(name).main
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return ScriptResult(stop.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def interpreted() -> Callable[..., str]:
    """Standard output of a Python process in which Triton interprets its kernels; it must end well.

    Takes the arguments of the interpreter, seconds, and further environment variables.
    """

    def run(*arguments: object, timeout: float = 300, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, INTERPRETING, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment},
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-6000:]
        return done.stdout

    return run


@pytest.fixture
def interpreted_tests(interpreted: Callable[..., str]) -> Callable[..., str]:
    """What pytest says of the tests of a file that are chosen by keyword, run where Triton interprets its kernels."""

    def run(file: Path, chosen: str, timeout: float, **environment: str) -> str:
        options = "-q", "-p", "no:cacheprovider", "-p", "no:cov", "-k", chosen
        return interpreted("-m", "pytest", *options, file, timeout=timeout, PYTEST_ADDOPTS="", **environment)

    return run

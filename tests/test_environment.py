"""Both ways to install agree, requirements are what is imported, modules import anywhere, no file names a machine."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("convnextv2", "sparse_ops", "studies")
OPTIONAL = {
    "MinkowskiEngine",  # built by a script of its own
    "triton",  # brought by torch where there is CUDA
    "pydicom",  # of the extra ``science``, as are tifffile and imagecodecs
    "tifffile",
    "segmentation_models_pytorch",  # decoders, of the extra segment
    "transformers",  # a rival of the benchmark of the dense network
    "onnxruntime",  # runs what was exported
    "pyarrow",  # writes features as tables, reads images from them
    "shtab",  # completion in shells
    "umap-learn",  # one of the maps of features
}
"""Imported only where what needs it is asked for, or where it is there."""
DISTRIBUTION_OF = {"umap": "umap-learn", "PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(name: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in text_of(name).splitlines())
    return [Requirement(line) for line in lines if line]


def make_variables() -> dict[str, str]:
    return dict(re.findall(r"^(\w+) \??= *(.*)$", text_of("Makefile"), re.M))


def expanded(text: str, variables: dict[str, str]) -> str:
    while "$(" in text:
        text = re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], text)
    return text


def test_conda_and_make_install_the_same() -> None:
    installed = re.findall(r"pip install --quiet (\$\(PIP_ARGS\)\S*)", text_of("Makefile"))
    by_make = {expanded(arguments, make_variables()) for arguments in installed}
    environment = yaml.safe_load(text_of("environment.yml"))
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    by_conda = " ".join(pip)
    own = by_conda.removesuffix("[test]")
    assert by_make == {by_conda, own, f"{own}[release]", f"{own}[docs]"}
    assert by_conda.endswith("[test]")


def test_environment_has_the_name_that_the_readme_activates() -> None:
    name = yaml.safe_load(text_of("environment.yml"))["name"]
    assert f"conda activate {name}\n" in text_of("README.md")


def test_setup_installs_requirements_txt(setup_arguments: dict[str, Any]) -> None:
    found = setup_arguments
    assert [str(Requirement(line)) for line in found["install_requires"]] == [
        str(line) for line in requirements("requirements.txt")
    ]
    (extension,) = found["ext_modules"]
    assert extension.optional
    for source in extension.sources:
        assert (ROOT / source).is_file(), source
    assert {ROOT / name for name in extension.depends} == set((ROOT / "sparse_ops/backends/cpu/csrc").iterdir())


def test_constraints_allow_what_is_required() -> None:
    required = {line.name: line.specifier for line in requirements("requirements.txt")}
    for line in requirements("constraints.txt"):
        (pin,) = line.specifier
        assert pin.operator == "=="
        assert pin.version in required[line.name], f"{line} against {line.name}{required[line.name]}"


def imports_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def third_party(*folders: str) -> dict[str, str]:
    """Distribution to a file that imports it."""
    beside = [folder for folder in folders if folder not in PACKAGES]  # whose files import each other by name
    own = {*PACKAGES, *folders, *(file.stem for folder in beside for file in (ROOT / folder).glob("*.py"))}
    return {
        DISTRIBUTION_OF.get(name, name): file.relative_to(ROOT).as_posix()
        for folder in folders
        for file in sorted((ROOT / folder).rglob("*.py"))
        for name in imports_of(file)
        if name not in sys.stdlib_module_names and name not in own
    }


def test_requirements_are_what_is_imported() -> None:
    imported = third_party(*PACKAGES, "scripts", "benchmarks")
    required = {line.name for line in requirements("requirements.txt")}
    imported = {name: file for name, file in imported.items() if name not in OPTIONAL}
    missing = {name: file for name, file in imported.items() if name not in required}
    assert not missing, f"imported, but not in requirements.txt: {missing}"
    assert required == set(imported), f"in requirements.txt, but never imported: {required - set(imported)}"


def test_sparse_ops_needs_torch_alone() -> None:
    assert set(third_party("sparse_ops")) - OPTIONAL == {"torch"}
    names = {name for file in (ROOT / "sparse_ops").rglob("*.py") for name in imports_of(file)}
    assert "convnextv2" not in names


IMPORT_EVERYTHING = """
import importlib, pkgutil
for package in ("convnextv2", "sparse_ops", "studies"):
    found = importlib.import_module(package)
    for module in pkgutil.walk_packages(found.__path__, package + "."):
        if not module.name.endswith(("._cpu", "_kernels", "__main__")):
            print(importlib.import_module(module.name).__name__)
import sys, torch
assert not torch.cuda.is_initialized()
assert "MinkowskiEngine" not in sys.modules
"""


def test_every_module_imports_without_gpu_and_compiler() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    files = [file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    expected = {".".join(file.with_suffix("").parts) for file in files if not re.match(r"__|.*_kernels\.py", file.name)}
    assert expected <= set(result.stdout.split())


MACHINES = re.compile(
    r"(?<![\w.<-])/(?:home|work|root|Users|mnt|tmp)/\w"  # somebody's folders
    r"|\bpypi\.(?:org|python)|pythonhosted|anaconda\.(?:org|com)|download\.pytorch|(?:extra-)?index-url"
)


def tracked_files() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        folders = (*PACKAGES, "scripts", "benchmarks", "docs", "tests")
        return [*ROOT.glob("*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*.*"))]
    return [ROOT / name for name in listed.split("\0") if name]


def test_no_file_names_a_machine_or_a_registry() -> None:
    files = tracked_files()
    assert ROOT / "README.md" in files
    found = []
    for file in files:
        if not file.is_file() or file == Path(__file__).resolve():
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{file.relative_to(ROOT)}: {match[0]}" for match in MACHINES.finditer(text)]
    assert not found


@pytest.mark.parametrize("text", ["see /home/ann/x", "'/work/main'", "--index-url", "https://pypi.org/simple"])
def test_machine_names_are_recognised(text: str) -> None:
    assert MACHINES.search(text)
    assert not MACHINES.search("runs/work/x, benchmarks/tmp/x, $(OUT)x/root/y, scripts/home/z")


SKIPPING = """
import pytest
def test_plain(): pytest.skip("no reason")
def test_device(): pytest.skip("no CUDA device")
@pytest.mark.skipif(True, reason="a mark")
def test_mark(): pass
"""


def skip_in_a_suite(folder: Path, *arguments: str, required: str) -> subprocess.CompletedProcess[str]:
    """A run of our conftest.py over tests that are skipped, and a file whose import is."""
    (folder / "conftest.py").write_text(text_of("tests/conftest.py"))
    (folder / "test_some.py").write_text(SKIPPING)
    (folder / "test_import.py").write_text("import pytest\npytest.importorskip('nothing_of_this_name')\n")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "REQUIRE_BACKENDS": required, "PYTHONPATH": paths, "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:cov", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_nothing_is_skipped_in_silence(tmp_path: Path) -> None:
    assert skip_in_a_suite(tmp_path, required="").returncode == 0
    done = skip_in_a_suite(tmp_path, "--continue-on-collection-errors", required="reference")
    assert done.returncode == 1
    assert set(re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)) == {
        "test_import.py",
        "test_some.py::test_plain",
        "test_some.py::test_mark",
    }
    assert "no CUDA device" in done.stdout


def test_no_test_runs_without_the_backends_that_are_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_OPS_CPU_LIBRARY", str(tmp_path / "missing.so"))
    done = skip_in_a_suite(tmp_path, required="reference cpu")
    assert done.returncode == 4
    told = r"^cpu: its C\+\+ extension missing\.so cannot be loaded .*unset SPARSE_OPS_CPU_LIBRARY"
    assert re.search(told, done.stderr, re.M)


def test_what_is_checked_before_a_change_goes_in() -> None:
    assert re.findall(r"^make (.+)$", text_of(".ci/run"), re.M) == [
        "lint",
        "sanitize",
        "test COVERAGE=90",
        "study STUDY=digits SCALE=smoke",
    ]
    assert re.search(r"^test: export REQUIRE_BACKENDS = .*cpu minkowski", text_of("Makefile"), re.M)

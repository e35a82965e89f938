"""The installer of MinkowskiEngine: what it finds, changes, tells, keeps and refuses. Nothing is compiled here."""

import ast
import dataclasses
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "install_minkowski.py"
COMMANDS = ROOT / "convnextv2" / "commands"
FILES = sorted(COMMANDS.glob("*minkowski*.py"))


@pytest.fixture
def installer() -> ModuleType:
    return importlib.import_module("convnextv2.commands.minkowski")


@pytest.fixture
def toolchain(installer: ModuleType) -> ModuleType:
    return importlib.import_module("convnextv2.commands._minkowski_toolchain")


@pytest.fixture
def source(installer: ModuleType) -> ModuleType:
    return importlib.import_module("convnextv2.commands._minkowski_source")


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_it_starts_with_the_standard_library_alone() -> None:
    folders = [SCRIPT, ROOT / "convnextv2" / "__init__.py", COMMANDS / "__init__.py"]
    for file in [*folders, *FILES]:
        if file.stem == "_minkowski_check":  # runs in a process of its own, with torch
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"convnextv2"}, (file, names)
    program = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='imported')"
    isolated = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)
    assert (isolated.returncode, isolated.stderr) == (0, "")


def test_help_explains_every_option() -> None:
    text = run("--help").stdout
    options = ("--cpu", "--cuda", "--arch", "--cuda-home", "--blas", "--jobs", "--cache", "--rebuild", "--check")
    for option in options:
        assert f"  {option} " in text or f"  {option}\n" in text, option
    assert "$MINKOWSKI_CACHE" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "hopper"], "--arch takes compute capabilities such as 9.0, not 'hopper'"),
        (["--cpu", "--cuda"], "not allowed with argument"),
        (["--cpu", "--arch", "9.0"], "--arch is for --cuda"),
        (["--jobs", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_wrong_options_are_status_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]


def test_check_lists_every_requirement(tmp_path: Path) -> None:
    result = run("--check", "--cpu", "--cache", tmp_path / "cache")
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert {"system", "Python", "environment", "pip", "torch", "C++ compiler", "Python.h", "OpenBLAS", "disk"} <= set(
        lines
    )
    assert "ok" in lines["torch"]
    missing = [line for line in result.stdout.splitlines() if " missing " in line]
    assert result.returncode == (1 if missing else 0)
    assert not (tmp_path / "cache").exists(), "a check changes nothing"


def test_check_names_what_is_missing_and_its_remedy(tmp_path: Path) -> None:
    result = run("--check", "--cuda", "--blas", "system", "--cache", tmp_path, PATH=str(tmp_path), CXX="", CUDA_HOME="")
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    (index,) = [i for i, line in enumerate(lines) if line.startswith("C++ compiler")]
    assert "missing  none on the path" in lines[index]
    assert "remedy:  apt install g++" in lines[index + 1]
    assert any(line.startswith("OpenBLAS") and " missing " in line for line in lines)


def test_without_a_compiler_it_stops_in_one_line(tmp_path: Path) -> None:
    result = run("--cpu", "--cache", tmp_path / "cache", PATH=str(tmp_path), CXX="")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: C++ compiler: none on the path; apt install g++")


def test_without_torch_it_stops_in_one_line(installer, toolchain, monkeypatch, capsys) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    monkeypatch.setattr(sys, "argv", ["install_minkowski.py", "--cpu"])
    assert installer.main() == 2
    assert capsys.readouterr().err == "error: torch: not installed; pip install torch, with this Python's pip\n"


def test_a_managed_python_needs_a_virtual_environment(toolchain, monkeypatch, tmp_path) -> None:
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda _name: str(tmp_path))
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    found = toolchain._environment()
    assert not found.met
    assert "managed by the system" in found.found
    assert "venv" in found.remedy
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert toolchain._environment().met


@pytest.mark.parametrize(
    ("version", "met"),
    [
        ("g++ (Debian 12.2.0-14+deb12u1) 12.2.0", True),
        ("c++ (GCC) 8.5.0 20210514 (Red Hat 8.5.0-20)", False),
        ("x86_64-conda-linux-gnu-c++ (conda-forge gcc 14.1.0-1) 14.1.0", True),
        ("Ubuntu clang version 14.0.0-1ubuntu1", True),
    ],
)
def test_an_old_gcc_is_told(toolchain, version, met) -> None:
    assert toolchain._compiler((("c++",), version)).met is met


def test_an_nvcc_of_another_cuda_is_told(toolchain, tmp_path) -> None:
    torch = toolchain.Torch("2.11.0+cu130", "13.0")
    assert toolchain._nvcc(toolchain.Cuda(tmp_path, "13.1"), torch).met
    other = toolchain._nvcc(toolchain.Cuda(tmp_path, "12.8"), torch)
    assert not other.met
    assert "12.8" in other.found
    assert "13.0" in other.remedy
    assert "built without CUDA" in toolchain._nvcc(None, toolchain.Torch("2.11.0+cpu", None)).found
    assert not toolchain._arch((), torch).met
    assert toolchain._arch(("9.0",), torch).met


def test_condas_openblas_comes_first_and_pypis_last(toolchain, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path))
    monkeypatch.setattr(toolchain, "_system_header", lambda _compiler: tmp_path)
    monkeypatch.setattr(toolchain, "_system_library", lambda _compiler: tmp_path / "libopenblas.so")
    compiler = ("c++",)
    assert toolchain.find_blas("auto", compiler).origin == "system"
    for name in ("include/cblas.h", "lib/libopenblas.so"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert toolchain.find_blas("auto", compiler).origin == "conda"
    assert toolchain.find_blas("pypi", compiler).origin == "pypi"
    monkeypatch.setattr(toolchain, "_system_header", lambda _compiler: None)
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "nothing"))
    assert toolchain.find_blas("auto", compiler).origin == "pypi"
    assert toolchain.find_blas("system", compiler) is None


@pytest.fixture
def unpacked(source, tmp_path: Path) -> Path:
    """A source tree with the lines that the changes look for."""
    for name in source.SEQUENCE_MODULES:
        file = tmp_path / "MinkowskiEngine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        more = ", namedtuple" if "KernelGenerator" in name else ""
        file.write_text(f"import os\nfrom collections import Sequence{more}\n")
    (tmp_path / "src/3rdparty").mkdir(parents=True)
    (tmp_path / "src/3rdparty/concurrent_unordered_map.cuh").write_text(f"{{\n{source.UNIQUE_MAP}\n}}\n")
    (tmp_path / "setup.py").write_text(
        'setup(\n    packages=["MinkowskiEngine", "MinkowskiEngine.utils"],\n    ext_modules=ext_modules,\n)\n'
    )
    return tmp_path


def test_the_source_is_changed_where_today_needs_it(source, unpacked, tmp_path) -> None:
    library = tmp_path / "libscipy_openblas.so"
    library.write_bytes(b"ELF")
    source.prepare(unpacked, [library])
    for name in source.SEQUENCE_MODULES:
        exec((unpacked / "MinkowskiEngine" / name).read_text(), {})
    assert "shared_ptr<Self>" in (unpacked / "src/3rdparty/concurrent_unordered_map.cuh").read_text()
    found: dict = {}
    code = (unpacked / "setup.py").read_text()
    exec(code, {"setup": lambda **options: found.update(options), "ext_modules": []})
    assert found["packages"][0] == "MinkowskiEngineBackend"
    assert found["package_data"] == {"MinkowskiEngineBackend": ["*.so*"]}
    assert (unpacked / "MinkowskiEngineBackend/libscipy_openblas.so").read_bytes() == b"ELF"


def test_another_source_is_refused(source, unpacked) -> None:
    (unpacked / "MinkowskiEngine/MinkowskiCommon.py").write_text("from typing import Sequence\n")
    with pytest.raises(
        source.SourceError, match=r"MinkowskiCommon.py of MinkowskiEngine 0.5.4 is not as expected: 0 ×"
    ):
        source.prepare(unpacked, [])


def test_the_uninstall_of_setup_py_does_nothing(source, tmp_path) -> None:
    path = source.with_front("PATH", source.idle_pip(tmp_path / "idle"))
    done = subprocess.run(
        ["sh", "-c", "pip uninstall torch -y"], env={"PATH": path}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_pypis_openblas_is_renamed_and_shipped(installer, toolchain, monkeypatch, tmp_path) -> None:
    def fetch(folder: Path, *_packages: str) -> None:
        root = folder / "scipy_openblas32"
        (root / "include").mkdir(parents=True)
        (root / "include/cblas.h").write_text("void scipy_cblas_sgemm(void);\n")
        (root / "lib").mkdir()
        (root / "lib/libscipy_openblas.so").touch()

    monkeypatch.setattr(installer, "pip_target", fetch)
    include, lib, bundled = installer.link_blas(toolchain.Blas("pypi"), tmp_path)
    text = (include / "cblas.h").read_text()
    assert all(f"#define {name} scipy_{name}\n" in text for name in toolchain.BLAS_FUNCTIONS)
    assert (lib / "libopenblas.so").resolve() == bundled[0].resolve()
    system = toolchain.Blas("system", Path("/usr/include"), Path("/usr/lib/libopenblas.so"))
    assert installer.link_blas(system, tmp_path / "x") == (Path("/usr/include"), Path("/usr/lib"), [])


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "[1/2] c++ a\na.cpp:3:1: error: 'x' was not declared\nb.cpp:9: error: later\nFAILED: a.o",
            "a.cpp:3:1: error: 'x'",
        ),
        ("warning: no\nfatal error: cblas.h: No such file\n", "fatal error: cblas.h"),
        ("ld: cannot find -lopenblas: No such file\ncollect2: error: ld returned 1", "collect2: error"),
        ("Traceback\nRuntimeError: CUDA version (12.8) mismatches\n", "RuntimeError: CUDA version (12.8)"),
        ("", "no output"),
    ],
)
def test_the_first_error_is_told(installer, log, expected) -> None:
    assert installer.first_error(log).startswith(expected)


SETUP = """
import sys, time
print("[1/2] c++ one", flush=True)
time.sleep(1.5)
print("[2/2] c++ two", flush=True)
{end}
"""


def test_progress_is_told_and_the_wheel_found(installer, tmp_path, capsys) -> None:
    end = "import pathlib; pathlib.Path('dist').mkdir(); pathlib.Path('dist/x.whl').touch(); time.sleep(1.5)"
    (tmp_path / "setup.py").write_text(SETUP.format(end=end))
    wheel = installer.compile_wheel(tmp_path, "cpu", dict(os.environ), tmp_path / "log")
    assert wheel.name == "x.whl"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["1 of 2 files compiled", "2 of 2 files compiled"]


def test_a_failed_build_leaves_its_log_and_no_wheel(installer, toolchain, monkeypatch, tmp_path) -> None:
    end = "print('a.cpp:1:2: error: no luck', file=sys.stderr); print('30,000 lines'); sys.exit(1)"

    def fetch(folder: Path, _environment: object) -> Path:
        (folder / "setup.py").write_text(SETUP.format(end=end))
        return folder

    monkeypatch.setattr(installer, "fetch", fetch)
    monkeypatch.setattr(installer, "prepare", lambda *_: None)
    monkeypatch.setattr(installer, "build_environment", lambda *_: (dict(os.environ), []))
    tools = toolchain.Toolchain(None, ("c++",), toolchain.Blas("pypi"))
    with pytest.raises(installer.BuildError, match=r"a.cpp:1:2: error: no luck \(whole log: .*key.log\)"):
        installer.build("cpu", tools, (), 1, tmp_path / "cache/key")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["key.log"]
    assert "30,000 lines" in (tmp_path / "cache/key.log").read_text()


def test_an_interrupted_build_takes_its_compilers_along(installer, monkeypatch, tmp_path) -> None:
    pid = tmp_path / "pid"
    child = (
        f"import subprocess; c = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(c.pid)); c.wait()"
    )
    (tmp_path / "setup.py").write_text(child)

    def interrupt(_seconds: float) -> None:
        if pid.exists() and pid.read_text():
            raise KeyboardInterrupt
        real_sleep(0.1)

    real_sleep = time.sleep
    monkeypatch.setattr(installer.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        installer.compile_wheel(tmp_path, "cpu", dict(os.environ), tmp_path / "log")
    monkeypatch.undo()
    status = Path(f"/proc/{pid.read_text()}/stat")
    for _ in range(50):
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the compiler still runs")


def test_a_wheel_is_kept_for_exactly_what_it_was_built_for(installer, toolchain) -> None:
    torch, blas = toolchain.Torch("2.11.0+cu130", "13.0"), toolchain.Blas("pypi")
    key = installer.cache_key("cpu", torch, blas, (), None)
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert all(part in key for part in ("0.5.4", "torch2.11.0+cu130", python, "cpu", "pypi"))
    others = [
        installer.cache_key("cpu", dataclasses.replace(torch, version="2.12.0"), blas, (), None),
        installer.cache_key("cpu", torch, toolchain.Blas("conda"), (), None),
        installer.cache_key("cuda", torch, blas, ("9.0",), "13.0"),
        installer.cache_key("cuda", torch, blas, ("8.0", "9.0"), "13.0"),
        installer.cache_key("cuda", torch, blas, ("9.0",), "13.1"),
    ]
    assert len({key, *others}) == 6


def test_the_cache_is_outside_of_the_repository_and_can_be_moved(installer, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("MINKOWSKI_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert installer.default_cache() == tmp_path / "sparse-fcmae/minkowski"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert not installer.default_cache().is_relative_to(ROOT)
    monkeypatch.setenv("MINKOWSKI_CACHE", str(tmp_path / "mine"))
    assert installer.parse_arguments([]).cache == tmp_path / "mine"
    assert installer.parse_arguments(["--cache", str(tmp_path / "other")]).cache == tmp_path / "other"


@pytest.fixture
def cached(installer, toolchain, monkeypatch, tmp_path):
    """A cache with a wheel in it, and a record of what is done with wheels."""
    done: list[str] = []
    torch, blas = toolchain.Torch("2.11.0", None), toolchain.Blas("pypi")
    slot = tmp_path / installer.cache_key("cpu", torch, blas, (), None)
    slot.mkdir()
    (slot / "old.whl").touch()
    broken: list[str] = []

    def check(devices) -> None:
        done.append(f"check {','.join(devices)}")
        if broken and done[-2] == "install old.whl":
            raise installer.BuildError(broken[0])

    def build(*_args) -> Path:
        done.append("build")
        return slot / "new.whl"

    monkeypatch.setattr(installer, "install", lambda wheel: done.append(f"install {wheel.name}"))
    monkeypatch.setattr(installer, "check", check)
    monkeypatch.setattr(installer, "build", build)
    tools = toolchain.Toolchain(torch, ("c++",), blas)
    return (
        lambda *options: installer.obtain(
            installer.parse_arguments(["--cpu", "--cache", str(tmp_path), *options]), "cpu", tools
        ),
        done,
        broken,
    )


def test_a_cached_wheel_is_installed_and_checked(cached) -> None:
    obtain, done, _ = cached
    obtain()
    assert done == ["install old.whl", "check cpu"]


def test_a_cached_wheel_that_fails_its_check_is_built_anew(cached, capsys) -> None:
    obtain, done, broken = cached
    broken.append("libopenblas.so.0: cannot open shared object file")
    obtain()
    assert done == ["install old.whl", "check cpu", "build", "install new.whl", "check cpu"]
    assert "building it anew: libopenblas.so.0" in capsys.readouterr().out


def test_rebuild_passes_over_the_cache(cached) -> None:
    obtain, done, _ = cached
    obtain("--rebuild")
    assert done == ["build", "install new.whl", "check cpu"]


def test_a_second_process_waits_for_the_first(installer, tmp_path, capsys) -> None:
    lock = tmp_path / "key.lock"
    code = f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    code += "print('held', flush=True); time.sleep(2)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        start = time.monotonic()
        with installer.exclusive(lock):
            assert time.monotonic() - start > 1
    assert "waiting for another process" in capsys.readouterr().out


@pytest.mark.minkowski
def test_what_is_installed_passes_its_check() -> None:
    done = subprocess.run(
        [sys.executable, str(COMMANDS / "_minkowski_check.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "depthwise 7×7" in done.stdout
    assert "strided 2×2" in done.stdout


@pytest.mark.minkowski
def test_the_check_catches_a_wrong_convolution(monkeypatch, installer) -> None:
    checks = importlib.import_module("convnextv2.commands._minkowski_check")
    assert max(checks.check("cpu").values()) < checks.TOLERANCE
    monkeypatch.setattr(checks, "to_conv2d", lambda kernel, side: kernel.permute(2, 1, 0).unflatten(-1, (side, side)))
    assert min(checks.check("cpu").values()) > 1e-2


def test_a_build_that_does_not_import_is_told(installer, monkeypatch, tmp_path) -> None:
    broken = tmp_path / "check.py"
    broken.write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.setattr(installer, "CHECK", broken)
    with pytest.raises(installer.BuildError, match="does not pass its check: ImportError: undefined symbol"):
        installer.check(["cpu"])

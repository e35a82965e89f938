"""What a build of MinkowskiEngine needs on this machine, where it is, and how to get what is missing.

For :mod:`.minkowski`. Needs the standard library only; torch is asked in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

GIGABYTE = 1 << 30
DISK_NEEDED = {"cpu": 1 * GIGABYTE, "cuda": 3 * GIGABYTE}
MEMORY_PER_JOB = {"cpu": int(1.5 * GIGABYTE), "cuda": int(3.5 * GIGABYTE)}
MINIMUM_GCC = 9
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)

BLAS_PACKAGE = "scipy-openblas32"
BLAS_FUNCTIONS = ("cblas_sgemm", "cblas_dgemm", "cblas_saxpy", "cblas_daxpy")
"""All that MinkowskiEngine calls."""

BlasChoice = Literal["auto", "system", "pypi"]


@dataclass(frozen=True)
class Torch:
    """The torch of this environment."""

    version: str
    cuda: str | None
    """Version of CUDA that it is built for, such as ``13.0``."""
    devices: tuple[str, ...] = ()
    """Compute capability of each CUDA device, such as ``9.0``."""
    folder: str = ""


@dataclass(frozen=True)
class Blas:
    """An OpenBLAS to link with."""

    origin: Literal["conda", "system", "pypi"]
    include: Path | None = None
    library: Path | None = None

    def __str__(self) -> str:
        return f"{BLAS_PACKAGE} from PyPI" if self.origin == "pypi" else f"{self.origin}'s, {self.library}"


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit."""

    home: Path
    version: str


@dataclass(frozen=True)
class Requirement:
    """One line of ``--check``."""

    name: str
    met: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Toolchain:
    """What was found."""

    torch: Torch | None
    compiler: tuple[str, ...] | None
    blas: Blas | None
    cuda: Cuda | None = None
    requirements: list[Requirement] = field(default_factory=list)

    @property
    def missing(self) -> list[Requirement]:
        return [requirement for requirement in self.requirements if not requirement.met]


ASK_TORCH = """
import json, torch
count = torch.cuda.device_count() if torch.version.cuda and torch.cuda.is_available() else 0
devices = ["%d.%d" % torch.cuda.get_device_capability(i) for i in range(count)]
print(json.dumps([torch.__version__, torch.version.cuda, devices, torch.__path__[0]]))
"""


def find_torch() -> Torch | str:
    """The torch that this Python imports, or why it does not."""
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    done = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"cannot be imported: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    version, cuda, devices, folder = json.loads(done.stdout.splitlines()[-1])
    return Torch(version, cuda, tuple(devices), folder)


def find_compiler() -> tuple[tuple[str, ...], str] | None:
    """The C++ compiler, ``$CXX`` or the usual names, as a command and with its first line of ``--version``."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        command = tuple(shlex.split(name or ""))
        if command and shutil.which(command[0]):
            done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout:
                return command, done.stdout.splitlines()[0]
    return None


def find_blas(choice: BlasChoice, compiler: tuple[str, ...] | None) -> Blas | None:
    """conda's OpenBLAS, else the system's, else the one on PyPI; ``choice`` can rule out the last, or all but it."""
    if choice != "pypi":
        conda = Path(os.environ.get("CONDA_PREFIX", sys.prefix))
        library = conda / "lib/libopenblas.so"
        if library.exists() and (conda / "include/cblas.h").exists():
            return Blas("conda", conda / "include", library)
        if compiler is not None:
            header, found = _system_header(compiler), _system_library(compiler)
            if header and found:
                return Blas("system", header, found)
    return None if choice == "system" else Blas("pypi")


def _system_header(compiler: tuple[str, ...]) -> Path | None:
    """The folder of ``cblas.h`` that the compiler finds by itself, or that distributions put OpenBLAS's into."""
    done = subprocess.run(
        [*compiler, "-xc++", "-E", "-"], input="#include <cblas.h>\n", capture_output=True, text=True, check=False
    )
    found = re.search(r'^# 1 "(/.*/cblas\.h)"', done.stdout, re.M)
    if done.returncode == 0 and found:
        return Path(found[1]).parent
    folders = ("/usr/include/openblas", "/usr/include/x86_64-linux-gnu", "/usr/local/include", "/opt/OpenBLAS/include")
    return next((Path(folder) for folder in folders if Path(folder, "cblas.h").exists()), None)


def _system_library(compiler: tuple[str, ...]) -> Path | None:
    done = subprocess.run([*compiler, "-print-file-name=libopenblas.so"], capture_output=True, text=True, check=False)
    if done.stdout.startswith("/"):
        return Path(done.stdout.strip())
    built_here = Path("/opt/OpenBLAS/lib/libopenblas.so")  # where OpenBLAS's own Makefile installs
    return built_here if built_here.exists() else None


def find_cuda(chosen: Path | None, torch: Torch | None) -> Cuda | None:
    """The toolkit named, of ``$CUDA_HOME``, of the first nvcc on the path, of /usr/local/cuda, or from PyPI."""
    candidates = (
        [chosen] if chosen else [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    )
    if not candidates:
        nvcc = shutil.which("nvcc")
        candidates = [Path(nvcc).resolve().parent.parent] if nvcc else []
        candidates.append(Path("/usr/local/cuda"))
        if torch is not None and torch.cuda:
            candidates.append(Path(torch.folder).parent / "nvidia" / f"cu{torch.cuda.split('.')[0]}")
    for home in candidates:
        nvcc_file = home / "bin/nvcc"
        if nvcc_file.exists() and (home / "include/cuda_runtime.h").exists():
            done = subprocess.run([nvcc_file, "--version"], capture_output=True, text=True, check=False)
            version = re.search(r"release (\d+\.\d+)", done.stdout)
            if version:
                return Cuda(home, version[1])
    return None


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def available_memory() -> int | None:
    """Bytes, or None where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else None


def default_jobs(kind: Literal["cpu", "cuda"]) -> int:
    """Compilers to run at once: one a core, as far as the memory allows."""
    memory = available_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, 12, cores if memory is None else memory // MEMORY_PER_JOB[kind]))


def survey(
    kind: Literal["cpu", "cuda"], blas: BlasChoice, cache: Path, cuda_home: Path | None, arch: tuple[str, ...]
) -> Toolchain:
    """Look at everything that a build of that kind needs.

    Args:
        kind: for processors, or for CUDA.
        blas: which OpenBLAS may be taken.
        cache: folder of the wheels, where the build happens as well.
        cuda_home: folder of the toolkit, or None to look for it.
        arch: compute capabilities to compile for.
    """
    found_torch = find_torch()
    torch = found_torch if isinstance(found_torch, Torch) else None
    compiler = find_compiler()
    found_blas = find_blas(blas, compiler and compiler[0])
    requirements = [_system(), _python(), _environment(), _pip(), _torch(found_torch), _compiler(compiler), _headers()]
    requirements.append(
        Requirement(
            "OpenBLAS",
            found_blas is not None,
            "no cblas.h and libopenblas.so" if found_blas is None else str(found_blas),
            "apt install libopenblas-dev, or conda install openblas, or leave out --blas system to take PyPI's",
        )
    )
    requirements += [_disk(kind, cache), _memory(kind)]
    cuda = None
    if kind == "cuda":
        cuda = find_cuda(cuda_home, torch)
        requirements += [_nvcc(cuda, torch), _arch(arch, torch)]
    return Toolchain(torch, compiler and compiler[0], found_blas, cuda, requirements)


def _system() -> Requirement:
    found = f"{platform.system()} {platform.machine()}"
    return Requirement("system", sys.platform == "linux", found, "build on Linux, or in WSL on Windows")


def _python() -> Requirement:
    version = sys.version_info[:2]
    return Requirement(
        "Python",
        OLDEST_PYTHON <= version <= NEWEST_PYTHON,
        platform.python_version(),
        "use Python {}.{} to {}.{}".format(*OLDEST_PYTHON, *NEWEST_PYTHON),
    )


def _environment() -> Requirement:
    virtual = sys.prefix != sys.base_prefix or Path(sys.prefix, "conda-meta").is_dir()
    managed = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()
    packages = Path(sysconfig.get_path("platlib"))
    writable = os.access(existing_parent(packages), os.W_OK)
    kind = "virtual environment" if virtual else "managed by the system" if managed else "not a virtual environment"
    return Requirement(
        "environment",
        writable and (virtual or not managed),
        f"{kind}, {sys.prefix}{'' if writable else ', not writable'}",
        "python3 -m venv .venv, install torch there, and run this script with .venv/bin/python",
    )


def _pip() -> Requirement:
    found = importlib.util.find_spec("pip") is not None
    return Requirement("pip", found, "found" if found else "not installed", "python -m ensurepip")


def _torch(found: Torch | str) -> Requirement:
    text = found if isinstance(found, str) else f"{found.version}, CUDA {found.cuda or 'no'}"
    return Requirement("torch", isinstance(found, Torch), text, "pip install torch, with this Python's pip")


def _compiler(found: tuple[tuple[str, ...], str] | None) -> Requirement:
    remedy = f"apt install g++, or conda install cxx-compiler; GCC {MINIMUM_GCC} or newer, or Clang"
    if found is None:
        return Requirement("C++ compiler", False, "none on the path", remedy)
    gcc = re.search(r"^(?:g\+\+|c\+\+|\S*-g\+\+|\S*-c\+\+) .*?(\d+)\.\d+\.\d+", found[1])
    return Requirement("C++ compiler", gcc is None or int(gcc[1]) >= MINIMUM_GCC, found[1], remedy)


def _headers() -> Requirement:
    header = Path(sysconfig.get_path("include"), "Python.h")
    return Requirement(
        "Python.h", header.exists(), f"{header}", "apt install python3-dev, or take a Python with its headers"
    )


def _disk(kind: Literal["cpu", "cuda"], cache: Path) -> Requirement:
    free, needed = shutil.disk_usage(existing_parent(cache)).free, DISK_NEEDED[kind]
    return Requirement(
        "disk",
        free >= needed,
        f"{free / GIGABYTE:.1f} GB free at {cache}",
        f"{needed / GIGABYTE:.0f} GB are needed: free some, or choose another folder with --cache",
    )


def _memory(kind: Literal["cpu", "cuda"]) -> Requirement:
    memory, needed = available_memory(), MEMORY_PER_JOB[kind]
    text = (
        "unknown" if memory is None else f"{memory / GIGABYTE:.1f} GB available, {default_jobs(kind)} compilers at once"
    )
    return Requirement(
        "memory", memory is None or memory >= needed, text, f"{needed / GIGABYTE:.1f} GB are needed by a compiler"
    )


def _nvcc(cuda: Cuda | None, torch: Torch | None) -> Requirement:
    wanted = torch.cuda if torch else None
    if torch is not None and wanted is None:
        return Requirement(
            "nvcc", False, "torch is built without CUDA", "install a torch for CUDA, or build with --cpu"
        )
    remedy = f"install CUDA {wanted}'s toolkit, or conda install cuda-nvcc={wanted}, and point --cuda-home at it"
    if cuda is None:
        return Requirement("nvcc", False, "not found", remedy)
    matches = wanted is None or cuda.version.split(".")[0] == wanted.split(".")[0]
    return Requirement("nvcc", matches, f"{cuda.version} in {cuda.home}, torch is for {wanted}", remedy)


def _arch(arch: tuple[str, ...], torch: Torch | None) -> Requirement:
    chosen = arch or (torch.devices if torch else ())
    return Requirement(
        "architecture",
        bool(chosen),
        ", ".join(dict.fromkeys(chosen)) or "no CUDA device here",
        "name one, as in --arch 9.0 (H100), 8.0 (A100), 8.9 (RTX 40)",
    )

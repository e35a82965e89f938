"""Build MinkowskiEngine from its released source, install it into the Python that runs this, and check its results.

The wheel is kept in a cache and installs in seconds the next time. Nothing else in the environment is changed.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from convnextv2.commands._minkowski_source import (
    CUDA_HEADER,
    REVISION,
    VERSION,
    SourceError,
    fetch,
    idle_pip,
    prepare,
    with_front,
)
from convnextv2.commands._minkowski_toolchain import (
    BLAS_FUNCTIONS,
    BLAS_PACKAGE,
    Blas,
    Requirement,
    Toolchain,
    Torch,
    default_jobs,
    find_cuda,
    find_torch,
    survey,
)

CACHE_VARIABLE = "MINKOWSKI_CACHE"
TOOLS = ("pip>=24", "setuptools>=70.1,<82", "wheel", "ninja")
"""What builds it, installed into the build's own folder: torch imports pkg_resources, which setuptools 82 dropped."""

CHECK = Path(__file__).with_name("_minkowski_check.py")
HEARTBEAT_SECONDS = 30

Kind = Literal["cpu", "cuda"]


class InstallError(RuntimeError):
    """Something that the user can act on, in one line."""


class BuildError(InstallError):
    """The build or the check of what it built failed."""


def default_cache() -> Path:
    """The platform's folder for caches, or the one in ``$MINKOWSKI_CACHE``."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-fcmae" / "minkowski"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--cpu", action="store_true", help="build for processors only")
    kind.add_argument(
        "--cuda",
        action="store_true",
        help="build for CUDA as well; needs nvcc of the CUDA version that torch is built for. Without --cpu or --cuda: "
        "for CUDA where torch sees a device and there is such an nvcc, else for processors",
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        default=[],
        metavar="X.Y",
        help="compute capabilities to compile for, such as 9.0; those of the devices here if left out",
    )
    parser.add_argument("--cuda-home", type=Path, metavar="DIR", help="CUDA toolkit; found through $CUDA_HOME or nvcc")
    parser.add_argument(
        "--blas",
        choices=("auto", "system", "pypi"),
        default="auto",
        help=f"OpenBLAS to link with: conda's or the system's, or the one that the package {BLAS_PACKAGE} brings, "
        "which is copied into the wheel; auto (default) takes the first of them that is there",
    )
    parser.add_argument("--jobs", type=positive, metavar="N", help="compilers at once; by cores and memory if left out")
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        metavar="DIR",
        help=f"folder of the built wheels and logs, also where the build happens; ${CACHE_VARIABLE}, or %(default)s",
    )
    parser.add_argument("--rebuild", action="store_true", help="build even if there is a wheel in the cache")
    parser.add_argument(
        "--check",
        action="store_true",
        help="list what a build needs, what is missing and how to get it; change nothing",
    )
    args = parser.parse_args(argv)
    wrong = [arch for arch in args.arch if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", arch)]
    if wrong:
        parser.error(f"--arch takes compute capabilities such as 9.0, not {wrong[0]!r}")
    if args.arch and args.cpu:
        parser.error("--arch is for --cuda")
    args.cache = args.cache.expanduser().absolute()
    return args


def positive(text: str) -> int:
    """A whole number of at least 1; an argparse type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def say(text: str) -> None:
    """One line on stdout."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def choose_kind(args: argparse.Namespace) -> Kind:
    """What was asked for, else CUDA where torch sees a device and nvcc fits."""
    if args.cpu or args.cuda or args.arch:
        return "cpu" if args.cpu else "cuda"
    torch = find_torch()
    if isinstance(torch, Torch) and torch.devices and torch.cuda:
        cuda = find_cuda(args.cuda_home, torch)
        if cuda is not None and cuda.version.split(".")[0] == torch.cuda.split(".")[0]:
            return "cuda"
        say(f"notice: a CUDA device, but no nvcc {torch.cuda}; building for processors (--check --cuda says more)")
    return "cpu"


def architectures(args: argparse.Namespace, torch: Torch) -> tuple[str, ...]:
    """Compute capabilities to compile for, in order and once each."""
    return tuple(sorted(set(args.arch or torch.devices)))


def cache_key(kind: Kind, torch: Torch, blas: Blas, arch: tuple[str, ...], cuda: str | None) -> str:
    """Name of the cached wheel's folder: everything that a wheel is tied to."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    target = "cpu" if kind == "cpu" else f"cu{cuda}-sm{'-'.join(arch)}"
    parts = (f"{VERSION}r{REVISION}", f"torch{torch.version}", python, target, blas.origin, platform.machine())
    return "_".join(parts)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file, so that a second process waits for the first's wheel instead of building its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that builds the same wheel")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_quietly(command: Sequence[str], what: str, environment: dict[str, str] | None = None) -> None:
    """Run a command that should say nothing; its last line of error becomes the message.

    Raises:
        InstallError: if it fails.
    """
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        telling = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        raise InstallError(f"{what} failed: {telling[-1].strip()}")


def pip_target(folder: Path, *packages: str) -> None:
    """Install packages into a folder of their own, with the user's pip and its configuration."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--target",
        str(folder),
    ]
    run_quietly([*command, *packages], f"fetching {', '.join(packages)}")


def link_blas(blas: Blas, folder: Path) -> tuple[Path, Path, list[Path]]:
    """Folders to search for ``cblas.h`` and for ``libopenblas.so``, and the libraries to ship in the wheel."""
    if blas.include is not None and blas.library is not None:
        return blas.include, blas.library.parent, []
    pip_target(folder / "package", BLAS_PACKAGE)
    root = folder / "package" / BLAS_PACKAGE.replace("-", "_")
    (library,) = (root / "lib").glob("libscipy_openblas*.so*")
    include, lib = folder / "include", folder / "lib"
    include.mkdir()
    lib.mkdir()
    # The package's functions carry a prefix, so that they do not meet another BLAS in the same process.
    renamed = "".join(f"#define {name} scipy_{name}\n" for name in BLAS_FUNCTIONS)
    (include / "cblas.h").write_text(f'{renamed}#include "{root}/include/cblas.h"\n', encoding="utf-8")
    (lib / "libopenblas.so").symlink_to(library)
    return include, lib, [library]


def cuda_environment(tools: Toolchain, arch: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Variables for a CUDA build; the header that is included first, and links to libraries, go to ``folder``."""
    assert tools.cuda is not None and tools.torch is not None
    home = tools.cuda.home
    header = folder / "before_every_source.cuh"
    header.write_text(CUDA_HEADER, encoding="utf-8")
    include, lib = [home / "include/cccl"], []
    # A toolkit without cuSPARSE and cuBLAS: torch's wheels have both, but without the names that a linker looks for.
    wheels = Path(tools.torch.folder).parent / "nvidia"
    if not (home / "include/cusparse.h").exists():
        include += sorted({file.parent for file in wheels.glob("*/include/cu[sb][pl]a*.h")})
        links = folder / "cuda-lib"
        links.mkdir()
        for library in wheels.glob("*/lib/lib*.so.*"):
            name = links / (library.name.split(".so")[0] + ".so")
            if not name.exists():
                name.symlink_to(library)
        lib.append(links)
    flags = f"-include {header} -DNVTX_DISABLE"
    return {
        "CUDA_HOME": str(home),
        "TORCH_CUDA_ARCH_LIST": ";".join(arch),
        "NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} {flags}".strip(),
        "CPATH": with_front("CPATH", *include),
        "LDFLAGS": " ".join(f"-L{path}" for path in lib),
    }


def build_environment(
    kind: Kind, tools: Toolchain, arch: tuple[str, ...], jobs: int, folder: Path
) -> tuple[dict[str, str], list[Path]]:
    """The build's environment, and the libraries to ship in the wheel; fetches tools into ``folder``."""
    assert tools.blas is not None and tools.compiler is not None
    pip_target(folder / "tools", *TOOLS)
    environment = dict(os.environ)
    if kind == "cuda":
        environment |= cuda_environment(tools, arch, folder)
    include, lib, bundled = link_blas(tools.blas, folder / "blas")
    rpath = "$ORIGIN" if bundled else lib
    flags = f"{environment.get('LDFLAGS', '')} -L{lib} -Wl,-rpath,{rpath} -Wl,--strip-debug"
    environment |= {
        "PATH": with_front("PATH", idle_pip(folder / "idle"), folder / "tools/bin"),
        "PYTHONPATH": with_front("PYTHONPATH", folder / "tools"),
        "CPATH": with_front("CPATH", include, environment=environment),
        "LDFLAGS": flags.strip(),
        "CFLAGS": f"{environment.get('CFLAGS', '')} -g0".strip(),
        "CXX": " ".join(tools.compiler),
        "MAX_JOBS": str(jobs),
        "PYTHONWARNINGS": "ignore",
    }
    return environment, bundled


def first_error(log: str) -> str:
    """The first line of a build's log that tells what went wrong."""
    for pattern in (r"(?:fatal )?error: ", r"undefined reference|cannot find -l", r"^\w*Error: ", r"FAILED: "):
        found = re.search(rf"^.*{pattern}.*$", log, re.M)
        if found:
            return found[0].strip()[:300]
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no output"


def compile_wheel(source: Path, kind: Kind, environment: dict[str, str], log: Path) -> Path:
    """Run setup.py, telling how far it is; returns the wheel.

    Raises:
        BuildError: with the compiler's first error and the path of the whole log.
    """
    target = "--cpu_only" if kind == "cpu" else "--force_cuda"
    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", "dist", target, "--blas=openblas"]
    start = told = time.monotonic()
    done = 0
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=source, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(1)
                now = time.monotonic()
                steps = re.findall(r"^\[(\d+)/(\d+)\]", log.read_text(encoding="utf-8", errors="replace"), re.M)
                count = int(steps[-1][0]) if steps else 0
                if count > done or now - told >= HEARTBEAT_SECONDS:
                    done, told = count, now
                    of = f"{count} of {steps[-1][1]} files compiled" if steps else "compiling"
                    say(f"{of}, {now - start:.0f} s")
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # the compilers too
            process.wait()
            raise
    wheels = list((source / "dist").glob("*.whl"))
    if process.returncode or not wheels:
        error = first_error(log.read_text(encoding="utf-8", errors="replace"))
        raise BuildError(f"the build failed: {error} (whole log: {log})")
    return wheels[0]


def build(kind: Kind, tools: Toolchain, arch: tuple[str, ...], jobs: int, slot: Path) -> Path:
    """Build the wheel into the cache; it appears there whole or not at all."""
    folder = slot.with_name(f"{slot.name}.build")
    shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed; the caller holds the lock
    folder.mkdir(parents=True)
    try:
        say("fetching the source and the build's tools")
        environment, bundled = build_environment(kind, tools, arch, jobs, folder)
        (folder / "source").mkdir()
        source = fetch(folder / "source", environment)
        prepare(source, bundled)
        say(f"compiling with {jobs} job{'s' if jobs > 1 else ''}, OpenBLAS: {tools.blas}")
        wheel = compile_wheel(source, kind, environment, slot.with_name(f"{slot.name}.log"))
        slot.mkdir(exist_ok=True)
        return wheel.replace(slot / wheel.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def install(wheel: Path) -> None:
    """Put the wheel into this environment, in place of any other build of the same version; nothing else changes."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run_quietly([*pip, "--no-deps", "--force-reinstall", "--no-cache-dir", str(wheel)], "installing the wheel")
    if importlib.util.find_spec("numpy") is None:
        run_quietly([*pip, "numpy"], "installing numpy")


def check(devices: Sequence[str]) -> None:
    """Compare what is installed with torch, on each device.

    Raises:
        BuildError: if it does not import, crashes, or computes something else.
    """
    for device in devices:
        done = subprocess.run(
            [sys.executable, str(CHECK), "--device", device], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = (done.stderr + done.stdout).strip().splitlines() or [f"it ended with status {done.returncode}"]
            raise BuildError(f"what was built does not pass its check: {lines[-1].strip()}")
        say(done.stdout.strip())


def show(requirements: Sequence[Requirement]) -> None:
    """The table of ``--check``."""
    width = max(len(requirement.name) for requirement in requirements)
    for requirement in requirements:
        say(f"{requirement.name:<{width}}  {'ok     ' if requirement.met else 'missing'}  {requirement.found}")
        if not requirement.met:
            say(f"{'':<{width}}  remedy:  {requirement.remedy}")


def obtain(args: argparse.Namespace, kind: Kind, tools: Toolchain) -> None:
    """Install the cached wheel if it is there and works, else build it."""
    assert tools.torch is not None and tools.blas is not None
    arch = architectures(args, tools.torch) if kind == "cuda" else ()
    key = cache_key(kind, tools.torch, tools.blas, arch, tools.cuda.version if tools.cuda else None)
    devices = ["cpu", "cuda"] if kind == "cuda" and tools.torch.devices else ["cpu"]
    slot = args.cache / key
    with exclusive(slot.with_name(f"{slot.name}.lock")):
        wheels = [] if args.rebuild else sorted(slot.glob("*.whl"))
        if wheels:
            say(f"taking {wheels[0].name} from the cache, {slot}")
            install(wheels[0])
            try:
                check(devices)
                return
            except BuildError as error:
                say(f"notice: the cached wheel does not work here any more, building it anew: {error}")
        wheel = build(kind, tools, arch, args.jobs or default_jobs(kind), slot)
        install(wheel)
        check(devices)
        say(f"kept in the cache: {wheel}")
        if kind == "cuda" and "cuda" not in devices:
            say("notice: built for CUDA, but there is no device here, so only its CPU side was checked")


def work(argv: Sequence[str] | None = None) -> int:
    """Check, or build and install; 0 if all is well."""
    start = time.monotonic()
    args = parse_arguments(argv)
    kind = choose_kind(args)
    tools = survey(kind, args.blas, args.cache, args.cuda_home, tuple(args.arch))
    if args.check:
        show(tools.requirements)
        return 1 if tools.missing else 0
    if tools.missing:
        first = tools.missing[0]
        more = f" ({len(tools.missing)} requirements are missing; --check lists them)" if tools.missing[1:] else ""
        raise InstallError(f"{first.name}: {first.found}; {first.remedy}{more}")
    obtain(args, kind, tools)
    say(f"MinkowskiEngine {VERSION} ({kind}) is installed in {sys.prefix}, after {time.monotonic() - start:.0f} s")
    return 0


def main() -> int:
    """:func:`work` with errors in one line: status 1 if the build failed, 2 if something is missing or wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the compilers are stopped and the folder removed
    try:
        return work()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BuildError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except (InstallError, SourceError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        sys.stderr.write(f"error: {where}{error.strerror or error}\n")
        return 2

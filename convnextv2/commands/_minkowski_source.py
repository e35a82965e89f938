"""MinkowskiEngine's released source: fetched by pip, and changed where today's Python and CUDA need it.

For :mod:`.minkowski`. Needs the standard library only.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

VERSION = "0.5.4"
REVISION = 1
"""Of the changes made here: raise it when they change, so that wheels of the former ones are not taken from a cache."""

SEQUENCE_MODULES = (
    "MinkowskiCommon.py",
    "MinkowskiCoordinateManager.py",
    "MinkowskiTensorField.py",
    "MinkowskiKernelGenerator.py",
    "utils/quantization.py",
)

UNIQUE_MAP = """    return std::unique_ptr<Self, std::function<void(Self*)>>{
      new Self(capacity, unused_element, unused_key, hash_function, equal, allocator, stream),
      deleter};"""
SHARED_MAP = """    return std::shared_ptr<Self>(
      new Self(capacity, unused_element, unused_key, hash_function, equal, allocator, stream),
      deleter);"""

CUDA_HEADER = """// Included before every CUDA source: what these took for granted of older CUDA toolkits and torch.
#pragma once
#include <ATen/ATen.h>
#include <cuda_runtime_api.h>
#include <functional>
#include <memory>
#include <thrust/execution_policy.h>
#include <thrust/remove.h>
#include <thrust/sort.h>
#include <thrust/unique.h>
#include <thrust/version.h>

#if THRUST_VERSION >= 300000  // removed there
namespace thrust {
template <typename Argument, typename Result> struct unary_function {
  using argument_type = Argument;
  using result_type = Result;
};
}  // namespace thrust
#endif

#if CUDART_VERSION >= 13000  // takes a location there; the callers give the number of a device
inline cudaError_t cudaMemPrefetchAsync(const void* pointer, size_t bytes, int device, cudaStream_t stream) {
  cudaMemLocation location{};
  location.type = cudaMemLocationTypeDevice;
  location.id = device;
  return cudaMemPrefetchAsync(pointer, bytes, location, 0, stream);
}
#endif
"""


class SourceError(RuntimeError):
    """The source could not be fetched, or is not the one that the changes are written for."""


def fetch(folder: Path, environment: Mapping[str, str]) -> Path:
    """Unpack the source distribution below ``folder`` and return its root.

    ``pip download`` runs the BLAS probe of setup.py, which fails, and takes no settings to avoid it. A dry run of an
    installation takes them, and leaves what it unpacked where it is told not to clean up.

    Args:
        folder: an empty folder.
        environment: of the process; its ``PATH`` must start with :func:`idle_pip`.

    Raises:
        SourceError: with pip's last error line.
    """
    settings = (f"--config-settings=--global-option={option}" for option in ("--blas=openblas", "--cpu_only"))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-clean", "--no-deps", "--no-build-isolation"]
    command += ["--ignore-installed", "--no-cache-dir", "--no-binary", "MinkowskiEngine", *settings]
    done = subprocess.run(
        [*command, f"MinkowskiEngine=={VERSION}"],
        env={**environment, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    found = sorted(folder.glob("pip-install-*/minkowskiengine*/setup.py"))
    if done.returncode or not found:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "ERROR" in line or "rror:" in line]
        raise SourceError(
            f"pip could not fetch MinkowskiEngine {VERSION}: {lines[-1] if lines else done.stderr[-300:]}"
        )
    return found[0].parent


def idle_pip(folder: Path) -> Path:
    """A folder with a ``pip`` that does nothing, for the front of ``PATH``.

    setup.py begins with ``pip uninstall MinkowskiEngine`` by the first pip on the path. If the build failed then, the
    user would be left without the one that worked.
    """
    folder.mkdir()
    script = folder / "pip"
    script.write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")
    script.chmod(0o755)
    return folder


def prepare(source: Path, bundled_libraries: list[Path]) -> None:
    """Change the source where today's Python, compilers and CUDA need it.

    Args:
        source: root of the unpacked source.
        bundled_libraries: shared libraries to ship beside the extension, which looks for them in its own folder.

    Raises:
        SourceError: if a place to change is not there exactly once.
    """
    for name in SEQUENCE_MODULES:
        replace(
            source / "MinkowskiEngine" / name,
            "from collections import Sequence",
            "from collections.abc import Sequence",
        )
    # namedtuple came by the same line.
    replace(
        source / "MinkowskiEngine" / "MinkowskiKernelGenerator.py",
        "from collections.abc import Sequence, namedtuple",
        "from collections import namedtuple\nfrom collections.abc import Sequence",
    )
    # Since C++17 the conversion of this unique_ptr to the caller's shared_ptr is ambiguous between two __to_address.
    replace(source / "src/3rdparty/concurrent_unordered_map.cuh", UNIQUE_MAP, SHARED_MAP)
    backend = source / "MinkowskiEngineBackend"
    backend.mkdir(exist_ok=True)
    for library in bundled_libraries:
        (backend / library.name).write_bytes(library.read_bytes())
    replace(
        source / "setup.py", 'packages=["MinkowskiEngine",', 'packages=["MinkowskiEngineBackend", "MinkowskiEngine",'
    )
    replace(
        source / "setup.py",
        "    ext_modules=ext_modules,\n",
        '    ext_modules=ext_modules,\n    package_data={"MinkowskiEngineBackend": ["*.so*"]},\n',
    )


def replace(file: Path, old: str, new: str) -> None:
    """Replace the only occurrence of ``old`` in a file.

    Raises:
        SourceError: if there is none, or more than one.
    """
    text = file.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise SourceError(f"{file.name} of MinkowskiEngine {VERSION} is not as expected: {text.count(old)} × {old!r}")
    file.write_text(text.replace(old, new), encoding="utf-8")


def with_front(variable: str, *folders: Path | str, environment: Mapping[str, str] = os.environ) -> str:
    """The value of a path variable with ``folders`` before what it holds."""
    parts = [str(folder) for folder in folders]
    if environment.get(variable):
        parts.append(environment[variable])
    return os.pathsep.join(parts)

"""Metadata, and the C++ extension of the ``cpu`` backend.

The extension is a plain shared library that knows neither torch nor Python. It is optional: without a compiler the
installation succeeds and the backend says how to get it.
"""

from __future__ import annotations

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.errors import CompileError
except ImportError:  # a setuptools before 59
    from distutils.errors import CompileError

ROOT = Path(__file__).parent
CSRC = "sparse_ops/backends/cpu/csrc"
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wno-attributes",
]
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
}


def version() -> str:
    """The version, from the package's source."""
    source = (ROOT / "convnextv2" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.M).group(1)


def requirements() -> list[str]:
    """What the package needs to run, from requirements.txt: environment.yml installs the same."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


class BuildKernels(build_ext):
    """Compiles the kernels once per instruction set, each with its own flags, into one library."""

    user_options: ClassVar = [
        *build_ext.user_options,
        ("sanitize", None, "with the sanitizers of addresses and undefined behaviour"),
    ]
    boolean_options: ClassVar = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = False

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        if sys.platform == "win32":
            raise CompileError("the C++ kernels need GCC or Clang; on Windows use the reference backend or WSL")
        units: list[tuple[str, list[str]]] = [("kernels_baseline", [])]
        macros: list[tuple[str, str | None]] = []
        if self.plat_name.rpartition("-")[2] in ("x86_64", "amd64"):
            for name, flags in INSTRUCTION_SETS.items():
                units.append((f"kernels_{name}", flags))
                macros.append((f"SPARSE_OPS_HAVE_{name.upper()}", None))
        units.append(("dispatch", []))
        common = FLAGS + (SANITIZED if self.sanitize else [])

        def compile_unit(unit: tuple[str, list[str]]) -> list[str]:
            name, flags = unit
            return self.compiler.compile(
                [f"{CSRC}/{name}.cpp"],
                output_dir=self.build_temp,
                macros=macros,
                extra_postargs=common + flags,
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [path for paths in pool.map(compile_unit, units) for path in paths]
        libraries = [] if sys.platform == "darwin" else ["dl", "pthread"]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=libraries,
            extra_postargs=SANITIZED if self.sanitize else [],
            target_lang="c++",
        )


setup(
    name="sparse-fcmae",
    version=version(),
    description="FCMAE: masked pre-training of ConvNeXt V2 on truly sparse features",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["convnextv2*", "sparse_ops*"]),
    package_data={"sparse_ops.backends.cpu": ["csrc/*"], "convnextv2": ["py.typed"], "sparse_ops": ["py.typed"]},
    install_requires=requirements(),
    extras_require={
        "test": [
            *("pytest>=8", "pytest-cov>=5", "pytest-xdist>=3.6", "hypothesis>=6", "ruff>=0.8", "mypy>=1.11"),
            *("import-linter>=2.1", "setuptools>=70.1", "transformers>=4.45"),
            *("onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.2"),
            *("torchinfo>=1.8", "thop>=0.1.1.post2209072238", "peft>=0.14"),
        ]
    },
    ext_modules=[
        Extension(
            "sparse_ops.backends.cpu._cpu",
            sources=[
                f"{CSRC}/{name}.cpp" for name in ("dispatch", "kernels_baseline", "kernels_avx2", "kernels_avx512")
            ],
            depends=sorted(str(file.relative_to(ROOT)) for file in (ROOT / CSRC).iterdir()),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: C++",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

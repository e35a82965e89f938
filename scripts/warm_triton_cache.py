"""Fills a Triton cache with the kernels of a GPU that need not be there, to be carried to a machine that has it.

    python scripts/warm_triton_cache.py --arch 90 --models tiny base --dtypes bfloat16 triton-cache
    python scripts/warm_triton_cache.py --relocate triton-cache      # over there: bring it into its new place
    TRITON_CACHE_DIR=$PWD/triton-cache python ...

Kernels are compiled as `Backend.warm_up` asks for them before a first step, with a driver that stands in for the GPU's.
Triton finds them again where its own version, build and ptxas are the same: its wheels differ from one Python version
to the next, so this is to be run with the Python version of the other machine. `--relocate` says whether they are.
The small C launchers, one for each signature, are built over there.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

LISTED = "warmed.json"
"""In the cache: what it was made for, and its kernels."""
CAPABILITIES = range(80, 130)


class Driver:
    """What Triton asks of a GPU's driver before it compiles, answered as `triton.backends.nvidia.driver` would."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def say(text: str) -> None:
    """One line of results; :mod:`_cli` needs packages that a GPU machine may lack."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def identity(arch: int) -> dict[str, Any]:
    """What Triton's cache keys hold besides a kernel: its version and build, ptxas, the architecture, variables."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    return {
        "triton": triton.__version__,
        "build": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas": get_ptxas_version(arch).strip().splitlines()[-1],
        "arch": arch,
        "variables": get_cache_invalidating_env_vars(),
    }


@functools.cache  # stages share kernels
def resources(cubin: Path) -> dict[str, int]:
    """Registers of a thread, and bytes of it that ptxas keeps in memory for want of registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    return {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"]}


def fill(folder: Path, arch: int, models: list[str], dtypes: list[str]) -> dict[str, Any]:
    """Compile what a training step of ``models`` launches, in each of ``dtypes``, into ``folder``.

    Returns:
        :func:`identity`, and ``kernels``: name, folder, warps, bytes of shared memory, whether it was compiled now, and
        its :func:`resources`, with the stage (cells a side, channels, kernel size) and the dtype it was asked for with.
    """
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    import torch
    import triton

    from convnextv2.models.fcmae import create_fcmae
    from sparse_ops.backends.triton.backend import TritonBackend

    kernels: list[dict[str, Any]] = []
    asked: dict[str, Any] = {}

    def compiled(*, metadata: dict[str, Any], metadata_group: dict[str, str], cache_hit: bool, **_: Any) -> None:
        place = Path(next(iter(metadata_group.values()))).parent.name
        facts = {"kernel": metadata["name"], "folder": place, "warps": metadata["num_warps"]}
        kernels.append({**facts, "shared": metadata["shared"], "compiled": not cache_hit, **asked})

    class Anywhere(TritonBackend):
        """Stage by stage, and of a GPU that is not there."""

        def rejects(self, device: torch.device, dtype: torch.dtype, kernel_size: int) -> str | None:
            return None

        def warm_up(self, stages: Any, kernel_size: int, device: torch.device, dtype: torch.dtype) -> None:
            for side, channels in stages:
                asked.update(side=side, channels=channels, kernel_size=kernel_size, dtype=str(dtype).split(".")[1])
                super().warm_up([(side, channels)], kernel_size, device, dtype)

    triton.runtime.driver.set_active(Driver(arch))
    triton.knobs.compilation.store_binary_only = True
    triton.knobs.compilation.listener = compiled
    backend = Anywhere()
    for model in models:
        with torch.device("meta"):
            network = create_fcmae(model if model.startswith("convnextv2_") else f"convnextv2_{model}")
        network.backend = backend
        for dtype in (getattr(torch, name) for name in dtypes):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                network._backends(torch.device("cpu"))
            say(f"{model}, {dtype}: {len(kernels)} kernels so far")
    for kernel in kernels:
        kernel |= resources(next((folder / kernel["folder"]).glob("*.cubin")))
    return {
        **identity(arch),
        "python": platform.python_version(),
        "models": models,
        "dtypes": dtypes,
        "kernels": kernels,
    }


def relocate(folder: Path) -> int:
    """Let Triton's lists of files, which hold whole paths, name those of a cache that was moved here.

    Returns:
        How many kernels there are.

    Raises:
        ValueError: if this Triton would not use them, or ``folder`` was not filled by this script.
        OSError: if its files cannot be read or written.
    """
    try:
        made_for = json.loads((folder / LISTED).read_text(encoding="utf-8"))
        here = identity(made_for["arch"])
        right = made_for.keys() >= {*here, "python"}
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {LISTED}: fill it with scripts/warm_triton_cache.py first") from None
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        right = False
    if not right:
        raise ValueError(f"{folder / LISTED} is not what this script writes: fill another folder")
    groups = sorted(folder.glob("*/__grp__*.json"))
    for group in groups:
        names = (Path(path).name for path in json.loads(group.read_text(encoding="utf-8"))["child_paths"].values())
        paths = {name: str(group.parent.resolve() / name) for name in names}
        group.write_text(json.dumps({"child_paths": paths}), encoding="utf-8")
    differs = [
        f"{name} {made_for[name]} there, {value} here" for name, value in here.items() if made_for[name] != value
    ]
    if differs:
        where = f"Python {made_for['python']} there, {platform.python_version()} here"
        raise ValueError(f"the kernels of {folder} will be compiled anew: {'; '.join(differs)} ({where})")
    return len(groups)


def main(argv: list[str] | None = None) -> int:
    """Fill or relocate; 2 where something is wrong that the user can mend."""
    from convnextv2.models.config import VARIANTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUTPUT", help="the cache; what it holds already is kept")
    parser.add_argument("--arch", type=int, default=90, help="compute capability without its dot: 80, 90 (Hopper), 100")
    parser.add_argument("--models", nargs="+", default=["atto", "tiny", "base"], help="variants, atto … huge")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--relocate", action="store_true", help="OUTPUT was moved here: bring it into its place")
    given = sys.argv[1:] if argv is None else argv
    if given and given[0].startswith("-"):  # OUTPUT is last, where an option of several values would take it
        given = [given[-1], *given[:-1]]
    args = parser.parse_args(given)
    unknown = [m for m in args.models if f"convnextv2_{m.removeprefix('convnextv2_')}" not in VARIANTS]
    if unknown:
        parser.error(f"unknown models {', '.join(unknown)}; choose from {', '.join(VARIANTS)}")
    if args.arch not in CAPABILITIES:
        parser.error(f"--arch {args.arch}: the kernels need compute capability 8.0 or newer, written as 80 or 90")
    folder = args.folder.resolve()
    try:
        if args.relocate:
            say(f"{relocate(folder)} kernels for sm_{json.loads((folder / LISTED).read_text())['arch']} in {folder}")
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        found = fill(folder, args.arch, args.models, args.dtypes)
        (folder / LISTED).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    new = sum(kernel["compiled"] for kernel in found["kernels"])
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    say(f"{len(found['kernels'])} kernels, {new} of them compiled now, {size / 2**20:.1f} MiB in {folder}")
    spilled = {kernel["kernel"]: kernel["spilled"] for kernel in found["kernels"] if kernel["spilled"]}
    told = ", ".join(f"{name} {number} bytes" for name, number in sorted(spilled.items()))
    say(f"kept in memory for want of registers: {told or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

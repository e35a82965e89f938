"""Of an installed wheel: the compiled backend is there, is right, and pre-trains. ``python tests/installed.py``

Not collected by name: the suite runs on the source tree, this on what pip installed, where no compiler is.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch

import convnextv2
from convnextv2.training import PretrainOptions, pretrain
from sparse_ops import registry
from sparse_ops.backends.cpu.library import load
from sparse_ops.conformance import check_conformance, check_mlp_conformance
from sparse_ops.conformance_cases import CASES, MLP_CASES


def main() -> None:
    place = Path(convnextv2.__file__).parent
    if "site-packages" not in place.parts:
        sys.exit(f"{place} is no installed package: run this outside of the source tree, without PYTHONPATH")
    cpu = registry()["cpu"]
    if (reason := cpu.unavailable_reason()) is not None:
        sys.exit(f"the wheel's backend does not run: {reason}")
    for case in [case for case in CASES if cpu.rejects(torch.device("cpu"), torch.float32, case.kernel_size) is None]:
        check_conformance(cpu, case)
    for pointwise in MLP_CASES:
        check_mlp_conformance(cpu, pointwise)
    with tempfile.TemporaryDirectory() as folder:
        options = PretrainOptions(
            data="digits", output=folder + "/run", backend="cpu", in_chans=1, img_size=32, patch_size=8, batch_size=128,
            epochs=3, warmup_epochs=0, decoder_dim=16, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), workers=0,
        )  # fmt: skip
        result = pretrain(options)
    if not result.last_loss < result.first_loss:
        sys.exit(f"pre-training went from a loss of {result.first_loss} to {result.last_loss}")
    library, _ = load()
    assert library is not None
    compiler = next((found for name in ("c++", "g++", "clang++", "cc") if (found := shutil.which(name))), "none")
    sys.stdout.write(
        f"sparse-fcmae {convnextv2.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}: "
        f"{len(CASES)} + {len(MLP_CASES)} cases on {library.sparse_ops_instruction_set().decode()}, "
        f"loss {result.first_loss:.3f} to {result.last_loss:.3f}, compiler: {compiler}\n"
    )


if __name__ == "__main__":
    main()

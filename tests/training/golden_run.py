"""A fixed tiny pre-training on the digits: the losses of its first 20 steps in the first process, as JSON.

python -m torch.distributed.run --nproc_per_node 2 tests/training/golden_run.py OUTPUT [BACKEND] is the same with two
processes and half a batch each, and a probe of what was learned. tests/training/golden_losses.json keeps what comes
out; see test_golden.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from convnextv2.training import PretrainOptions, pretrain

STEPS = 20


def losses(output: Path, backend: str, batch_size: int = 64, probe: str = "none") -> list[float]:
    """One thread: sums depend on how many share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: list[float] = []
    try:
        pretrain(
            PretrainOptions(
                data="digits",
                output=output,
                img_size=(32, 48),
                in_chans=1,
                patch_size=8,
                depths=(1, 1, 2, 1),
                dims=(8, 16, 24, 32),
                decoder_dim=16,
                drop_path=0.1,
                epochs=1,
                batch_size=batch_size,
                blr=0.02,
                backend=backend,
                workers=0,
                device="cpu",
                precision="no",
                reconstruct_every=0,
                probe=probe,
                probe_every=1,
                seed=5,
            ),
            on_loss=lambda step, loss: found.append(loss),
        )
    finally:
        torch.set_num_threads(threads)
    return found[:STEPS]


def machine() -> dict[str, str]:
    """What the bits of a float32 loss depend on beside the code; MKL chooses its kernels by vendor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    vendor = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "unknown")
    return {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "vendor": vendor}


if __name__ == "__main__":
    folder, backend = Path(sys.argv[1]), (*sys.argv[2:], "reference")[0]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    values = losses(folder / "run", backend, 64 // processes, "auto" if processes > 1 else "none")
    if os.environ.get("RANK", "0") == "0":
        (folder / "losses.json").write_text(json.dumps({"machine": machine(), "losses": values}), encoding="utf-8")

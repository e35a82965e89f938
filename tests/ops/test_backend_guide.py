"""The guide's backend, as it stands in docs/backends.md: one file more, and nothing else, makes a backend."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CHECKED = """
import sys, torch
import sparse_ops.backends
sparse_ops.backends.__path__.append(sys.argv[1])
from convnextv2 import create_fcmae
from convnextv2.models.config import EncoderConfig
from sparse_ops import get_backend, registry, resolve_backend
from sparse_ops.__main__ import report
from sparse_ops.conformance import check_conformance
from sparse_ops.conformance_cases import CASES, random_case

assert registry()["dense"].summary in report()
assert resolve_backend("auto", torch.device("cpu")).name != "dense"
for case in (*CASES, *map(random_case, range(12))):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_conformance("dense", case, dtype)
        print("passed", case)

config = EncoderConfig((1, 1, 1, 1), (8, 8, 8, 8), patch_size=16)
losses = {}
for name in ("dense", "reference"):
    torch.manual_seed(0)
    model = create_fcmae(config, img_size=64, backend=name, decoder_dim=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3, 64, 64).cumsum(3).sin(), generator=generator).loss
        loss.backward()
        optimizer.step()
    losses[name] = loss.item()
assert abs(losses["dense"] - losses["reference"]) < 1e-5, losses
"""


def test_the_guides_backend_conforms_and_trains(tmp_path):
    (source,) = re.findall(
        r"^```python\n(.*?class DenseBackend.*?)^```", (ROOT / "docs/backends.md").read_text(), re.M | re.S
    )
    (tmp_path / "dense.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-c", CHECKED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("passed") > 100

"""A ninth variant is one line of one file; everything else follows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINE = '    "convnextv2_zepto": ((1, 1, 2, 1), (16, 32, 64, 128)),\n'
PROGRAM = """
import contextlib, io, pickle, runpy, sys
import numpy as np
from PIL import Image
import convnextv2
from convnextv2 import EncoderConfig, convnextv2_zepto, create_fcmae, create_model
from convnextv2.models.config import encoder_config, variant_name

def script(name, *arguments):
    sys.argv, printed = [name, *arguments], io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        runpy.run_path(f"scripts/{name}.py", run_name="__main__")
    return printed.getvalue()

config = EncoderConfig((1, 1, 2, 1), (16, 32, 64, 128))
assert encoder_config("zepto") == encoder_config("convnextv2_zepto") == config
assert variant_name(config) == "convnextv2_zepto"
assert convnextv2_zepto(num_classes=3).config == create_model("convnextv2_zepto", num_classes=3).config
assert pickle.loads(pickle.dumps(convnextv2_zepto)) is convnextv2.convnextv2_zepto
assert create_fcmae("zepto", backend="reference").config.encoder == config
names = {}
exec("from convnextv2 import *", names)
assert names["convnextv2_zepto"] is convnextv2_zepto
assert "convnextv2_zepto" in dir(convnextv2)
parameters = sum(p.numel() for p in create_model("zepto").parameters())
assert f"{parameters:,} parameters" in script("summary", "zepto")
for number in range(4):
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(f"{number}.png")
script("pretrain", "--model", "zepto", "--data", ".", "--output", "run", "--img-size", "64", "--epochs", "1",
       "--batch-size", "2", "--decoder-dim", "16", "--backend", "reference", "--workers", "0")
said = script("convert_sparse_to_dense", "run", "dense.safetensors")
assert "layout fcmae, convnextv2_zepto (depths 1-1-2-1, widths 16-32-64-128" in said, said
assert "written: dense.safetensors" in said
"""


def test_a_ninth_variant_is_one_line(tmp_path: Path) -> None:
    for folder in ("convnextv2", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "convnextv2" / "models" / "config.py"
    above, huge, below = table.read_text().partition('    "convnextv2_huge"')
    table.write_text(above + LINE + huge + below)
    search = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

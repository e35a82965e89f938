import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image

from convnextv2.training.pretraining import PretrainOptions
from convnextv2.training.recipe import parse_options

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain.py"
TINY = ("--depths 1 1 1 1 --dims 8 8 8 8 --decoder-dim 8 --patch-size 8 --batch-size 4 --workers 0").split()  # noqa: SIM905  # as one types it


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bilder mit Ümlaut")
    rng = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run(SCRIPT, *arguments)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_recipe_lies_beneath_the_command_line(images: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("img_size: 64\nepochs: 7\nblr: 1e-3\nseed: 3\n")
    output = tmp_path / "run"
    arguments = ["--data", images, "--output", output, *TINY, "--img-size", "32x48", "--epochs", "1"]
    arguments += ["--config", recipe]
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert "loss fell from" in result.stdout
    assert "skipped 1 unusable file: " in result.stderr
    written = (output / "config.yaml").read_text()
    assert "epochs: 1\n" in written
    assert "img_size:\n- 32\n- 48\n" in written
    assert "seed: 3\n" in written
    assert "blr: 0.001\n" in written
    assert "weight_decay: 0.05\n" in written
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 1
    resumed = run("--output", output, "--resume", "--epochs", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert [json.loads(line)["epoch"] for line in (output / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    again = one_line(run(*arguments))
    assert "not empty" in again
    assert "--resume" in again


def test_errors_are_one_line(images: Path, tmp_path: Path) -> None:
    base = ["--data", images, "--output", tmp_path / "run", *TINY, "--img-size", "32"]
    assert "mask_ratio=1.0 keeps 0" in one_line(run(*base, "--mask-ratio", "1"))
    assert "--no-such-option" in one_line(run(*base, "--no-such-option"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("epoks: 3", "epoks"),
        ("epochs: [3", "recipe.yaml is no valid YAML"),
        ("- epochs", "expected a recipe"),
        ("img_size: big", "is not a size in pixels"),
        ("epochs: many", "epochs"),
        ("precision: fp8", "precision"),
        ("lr: .nan", "`lr` must be positive"),
        ("epochs: null", "`epochs` must be int, got None"),
        ("resume: [32, 32]", "`resume` must be"),
        ("config: 1e+308", "should name another recipe"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, recipe: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe + "\n")
    with pytest.raises((ValueError, TypeError), match=message):
        parse_options(PretrainOptions, ["--config", str(path), "--data", "digits", "--output", "run"], "").check()
    with pytest.raises(OSError, match="No such file"):
        parse_options(PretrainOptions, [f"--config={tmp_path / 'none.yaml'}"], "")


def test_help_explains_every_option() -> None:
    result = run("--help")
    assert result.returncode == 0
    for option in ("--data", "--mask-ratio", "--backend", "--grn-scope", "--resume", "--official-weight-decay"):
        assert option in result.stdout
    assert "<function" not in result.stdout
    assert "pixels: 224, or HEIGHTxWIDTH" in " ".join(result.stdout.split())


def test_sigterm_ends_with_143_and_a_usable_checkpoint(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ["--data", images, "--output", output, *TINY, "--img-size", "32", "--epochs", "5000"]
    process = subprocess.Popen([sys.executable, *map(str, [SCRIPT, *arguments])], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while not (output / "checkpoints" / "state").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert "stopped by SIGTERM" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["last.safetensors", "state"]


@pytest.mark.slow
def test_processes_of_a_launcher_make_one_run_and_report_once(images: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["--data", images, "--output", tmp_path / "run", *TINY, "--img-size", "32", "--epochs", "2"]
    result = subprocess.run(
        [*launcher, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("loss ") == 1
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert epochs == sorted(set(epochs))
    assert len(epochs) == 2

import json
import subprocess
from pathlib import Path

import forked
import numpy as np
from PIL import Image

from convnextv2.recipes import recipes
from convnextv2.training.finetuning import FinetuneOptions
from convnextv2.training.recipe import parse_options
from convnextv2.weights import zoo

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "finetune.py"
TINY = "--depths 1 1 1 1 --dims 8 8 8 8 --patch-size 8 --batch-size 4 --workers 0 --img-size 32".split()  # noqa: SIM905  # as one types it


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run(SCRIPT, *arguments)


def make_classes(folder: Path, classes: tuple[str, ...]) -> Path:
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / name / f"{index}.png")
    return folder


def test_train_and_val_folders_are_used_and_the_result_told(tmp_path: Path) -> None:
    make_classes(tmp_path / "data" / "train", ("роза", "tulip"))
    make_classes(tmp_path / "data" / "val", ("роза", "tulip"))
    result = run("--data", tmp_path / "data", "--output", tmp_path / "run", *TINY, "--epochs", "1")
    assert result.returncode == 0, result.stderr
    assert "on 8 validation images (epoch 1 of 1)" in result.stdout
    assert json.loads((tmp_path / "run" / "class_indices.json").read_text()) == {"0": "tulip", "1": "роза"}


def test_one_class_and_a_missing_checkpoint_are_one_line(tmp_path: Path) -> None:
    make_classes(tmp_path / "data", ("rose",))
    result = run("--data", tmp_path / "data", "--output", tmp_path / "run", *TINY)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "at least two classes" in result.stderr
    result = run("--data", "digits", "--output", tmp_path / "run", "--init", tmp_path / "none.pth")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'none.pth'}")
    assert not (tmp_path / "run").exists()


def test_every_variant_has_its_published_recipe() -> None:
    names = sorted({file.variant.removeprefix("convnextv2_") for file in zoo.PUBLISHED.values()})
    assert len(names) == 8
    assert [name for name in names if f"finetune_{name}" not in recipes()] == []
    for name in names:
        options = parse_options(FinetuneOptions, ["--config", name])
        assert options.model == f"convnextv2_{name}"
        assert options.batch_size * options.accum * 8 == 1024

"""What Python gives as options: of the right type, made to be so, or refused by the option's name, never by a flag."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from train_helpers import SMALL, finetune_options, make_images, pretrain_options

from convnextv2.training import FinetuneOptions, PretrainOptions, finetune, pretrain


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set")


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"epochs": None}, TypeError),
        ({"epochs": 1.5}, TypeError),
        ({"epochs": True}, TypeError),
        ({"epochs": [1]}, TypeError),
        ({"batch_size": "64"}, TypeError),
        ({"img_size": None}, ValueError),
        ({"img_size": "big"}, ValueError),
        ({"img_size": 64.5}, ValueError),
        ({"img_size": (64.5, 64)}, ValueError),
        ({"img_size": float("inf")}, ValueError),
        ({"lr": float("nan")}, ValueError),
        ({"lr": float("inf")}, ValueError),
        ({"lr": "1e-3"}, TypeError),
        ({"lr": 1j}, TypeError),
        ({"betas": (0.9,)}, TypeError),
        ({"betas": 0.9}, TypeError),
        ({"betas": ("a", "b")}, TypeError),
        ({"betas": (0.9, float("nan"))}, ValueError),
        ({"output": 3}, TypeError),
        ({"output": None}, TypeError),
        ({"data": 3}, TypeError),
        ({"data": None}, TypeError),
        ({"depths": (1, 1, 1)}, TypeError),
        ({"init": 1}, TypeError),
        ({"resume": "perhaps"}, TypeError),
        ({"resume": 1}, TypeError),
        ({"overwrite": "no"}, TypeError),
        ({"tf32": "no"}, TypeError),
        ({"device": torch.device("cpu")}, TypeError),
        ({"compile": True}, TypeError),
        ({"seed": -1}, ValueError),
    ],
    ids=str,
)
def test_wrong_types_name_the_option(images: Path, tmp_path: Path, changes: dict[str, Any], kind: type) -> None:
    ((name, _),) = changes.items()
    values = {**SMALL, "data": images, "output": tmp_path / "run", "backend": "reference", "epochs": 1, **changes}
    with pytest.raises(kind) as told:
        pretrain(PretrainOptions(**values))
    assert f"`{name}`" in str(told.value)
    assert "--" not in str(told.value)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


def test_types_are_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(TypeError) as told:
        pretrain(pretrain_options("digits", tmp_path, lr="fast"))
    assert str(told.value) == "`lr` must be float or None, got 'fast'"
    with pytest.raises(TypeError, match=re.escape("`epochs` must be int, got None")):
        pretrain(pretrain_options("digits", tmp_path, epochs=None))
    with pytest.raises(TypeError, match=re.escape("`output` must be str or Path, got 3")):
        PretrainOptions(data="digits", output=3).check()  # type: ignore[arg-type]


def test_what_stands_for_an_option_works(images: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        **SMALL, "data": images, "output": tmp_path / "run", "epochs": np.int64(1), "img_size": np.array([32, 32]),
        "depths": [1, 1, 1, 1], "dims": np.array([8, 8, 16, 16]), "lr": np.float32(0.25), "betas": [0.9, 0.9],
        "min_lr": 0, "mixup": 0, "hflip": 1, "weight_decay": np.float64(0.5),
    }  # fmt: skip
    options = FinetuneOptions(**values)
    result = finetune(options)
    recipe = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert (recipe["lr"], recipe["epochs"], recipe["weight_decay"]) == (0.25, 1, 0.5)
    assert (recipe["img_size"], recipe["dims"], recipe["betas"]) == ([32, 32], [8, 8, 16, 16], [0.9, 0.9])


def test_no_message_of_the_package_names_a_flag() -> None:
    """Flags are for ``--help`` and the command line; what is raised or logged names options in backticks."""
    root = Path(__file__).parents[2] / "convnextv2"
    found = []
    names = (
        "training/recipe.py",
        "training/recipe_files.py",
        "training/environment.py",
        "weights/loaders.py",
        "report/runs.py",
    )
    command_lines = {root / name for name in names}  # our own, and other programs'
    for path in set(root.rglob("*.py")) - set((root / "commands").iterdir()) - command_lines:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        helped = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "option"]
        apart = {id(inner) for node in helped for inner in ast.walk(node)}
        apart |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in apart
            if is_text and re.search(r"(^|\W)--[a-z][a-z-]+", node.value):
                found.append(f"{path.relative_to(root)}: {node.value}")
    assert not found


@pytest.mark.parametrize("which", [pretrain, finetune])
def test_notices_name_options(images: Path, tmp_path: Path, which: Any) -> None:
    lines: list[str] = []
    make = pretrain_options if which is pretrain else finetune_options
    which(make(images, tmp_path / "run", batch_size=100, epochs=1, lr=1.0), log=lines.append)
    assert not [line for line in lines if "--" in line]
    assert any("`batch_size` 100 lowered to" in line for line in lines)

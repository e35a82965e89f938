"""Every recipe of the package: launched as it says, its network built, a step of it run at a reduced width."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from shapes import make_pairs

from convnextv2 import create_fcmae, create_model
from convnextv2.models.config import VARIANTS
from convnextv2.recipes import find_recipe, recipes
from convnextv2.segmentation import Segmenter, SegmenterConfig, SegmentOptions, segment
from convnextv2.training import FinetuneOptions, PretrainOptions, finetune, pretrain
from convnextv2.training.components import COMPONENTS
from convnextv2.training.recipe import parse_options

ROOT = Path(__file__).parents[2]
RECIPES = list(recipes().values())
PUBLISHED = 8 * 512
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of eight noisy images; the batches of 16 and more are one step."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir()
        for index in range(8):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / name / f"{index}.png")
    return folder


def launched(recipe: Path) -> PretrainOptions | FinetuneOptions | SegmentOptions:
    """Options of the command that the head of a recipe names."""
    command = recipe.read_text(encoding="utf-8").partition("# Launch: ")[2].partition("\n# Expect: ")[0]
    words = shlex.split(command.replace("\n#", " "))
    kinds = {"pretrain": PretrainOptions, "finetune": FinetuneOptions, "segment": SegmentOptions}
    place = next(place for place, word in enumerate(words) if word in kinds)
    assert words[:place] in (["fcmae"], ["accelerate", "launch", "--num_processes", "8", "-m", "convnextv2"])
    kind: Any = kinds[words[place]]
    arguments = words[place + 1 :]
    assert kind is not SegmentOptions or arguments.pop(0) == "train"
    assert find_recipe(arguments[arguments.index("--config") + 1], kind.task) == recipe
    return parse_options(kind, arguments)


@every_recipe
def test_a_recipe_says_what_it_is_and_is_launched_as_it_says(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    head = text[: re.search(r"^[^#]", text, re.M).start()]  # type: ignore[union-attr]
    assert re.findall(r"^# (Launch|Expect|Source): ", head, re.M) == ["Launch", "Expect", "Source"]
    options = launched(recipe)
    replace(options, data=ROOT).check()
    for key, value in yaml.safe_load(text).items():
        if key == "config":
            continue
        for name, given in value.items() if key in COMPONENTS and isinstance(value, dict) else [(key, value)]:
            parsed = getattr(options, name)
            expected = tuple(given) if isinstance(given, list) else (given, given) if name == "img_size" else given
            assert parsed == (float(given) if isinstance(parsed, float) else expected), name


@every_recipe
def test_the_network_of_a_recipe_is_built(recipe: Path) -> None:
    options = launched(recipe)
    with torch.device("meta"):
        if isinstance(options, PretrainOptions):
            kept = ("mask_ratio", "decoder_depth", "decoder_dim", "norm_pix_loss", "grn_scope")
            shape = {name: getattr(options, name) for name in kept}
            model: Any = create_fcmae(options.encoder(), img_size=options.size, **shape)
        elif isinstance(options, SegmentOptions):
            known = replace(options, model=options.model or "convnextv2_atto", in_chans=3, patch_size=32)
            names = tuple("abcde")
            model = Segmenter(SegmenterConfig(known.encoder(), options.decoder, options.decoder_width, names))
        else:
            known = replace(options, model=options.model or "convnextv2_atto", in_chans=3, patch_size=32)
            model = create_model(known.encoder(), num_classes=1000)
    assert sum(parameter.numel() for parameter in model.parameters()) > 3e6


@every_recipe
def test_a_step_of_a_recipe_runs_at_a_reduced_width(recipe: Path, images: Path, tmp_path: Path) -> None:
    options = launched(recipe)
    small: dict[str, Any] = {
        "data": images, "output": tmp_path / "run", "depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16), "img_size": (64, 64),
        "epochs": 1, "cooldown_epochs": min(options.cooldown_epochs, 1), "batch_size": min(options.batch_size, 64),
        "min_steps": 0, "init": None, "resume": False, "workers": 0, "device": "cpu",
        "sharding": "none",  # there is one process
    }  # fmt: skip
    small = {name: value for name, value in small.items() if name in {field.name for field in fields(options)}}
    losses: list[tuple[int, float]] = []
    if isinstance(options, PretrainOptions):
        less = {"decoder_dim": 8, "reconstruct_every": 0, "backend": "reference"}
        result: Any = pretrain(replace(options, **small, **less), on_loss=lambda *loss: losses.append(loss))
    elif isinstance(options, SegmentOptions):
        pairs = make_pairs(tmp_path / "pairs", 20)
        result = segment(replace(options, **{**small, "data": pairs}), on_loss=lambda *loss: losses.append(loss))
    else:
        result = finetune(replace(options, **small, linear_probe=False), on_loss=lambda *loss: losses.append(loss))
    assert len(losses) == len(result.metrics) == 1
    assert 0 < losses[0][1] < 10


def test_all_variants_pre_train_by_the_published_recipe() -> None:
    """Which is one for all of them; docs/recipes.md has the batch that fits each."""
    recipe = recipes()["pretrain_imagenet1k"]
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| `--model (\w+) --batch-size (\d+) --accum (\d+)` \|", page, re.M)
    assert [f"convnextv2_{name}" for name, *_ in rows] == list(VARIANTS)
    for name, model, size, accum in rows:
        arguments = ["--model", model, "--batch-size", size, "--accum", accum]
        options = parse_options(PretrainOptions, ["--config", str(recipe), *arguments])
        assert options.model == f"convnextv2_{name}"
        assert options.batch_size * options.accum * 8 == PUBLISHED
        assert (options.blr, options.epochs, options.warmup_epochs, options.betas) == (1.5e-4, 800, 40, (0.9, 0.95))


def test_continued_pre_training_starts_from_weights(images: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "data": images, "depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16), "img_size": 64, "epochs": 1, "workers": 0,
        "decoder_dim": 8, "reconstruct_every": 0, "device": "cpu",
    }  # fmt: skip
    first = pretrain(PretrainOptions(output=tmp_path / "first", batch_size=16, **small))
    options = launched(recipes()["pretrain_continued"])
    lines: list[str] = []
    assert isinstance(options, PretrainOptions)
    second = pretrain(replace(options, output=tmp_path / "second", init=first.folder, **small), log=lines.append)
    assert any("nothing is freshly initialised" in line for line in lines)
    rate = second.metrics[0]["lr"]
    assert rate == pytest.approx(3e-4 * 16 / 256)
    before, after = (result.model.encoder.stages[0][0].dwconv.weight.detach() for result in (first, second))
    assert 0 < (after - before).abs().max() < 1.1 * rate  # one update of AdamW; random ones are 0.02 apart

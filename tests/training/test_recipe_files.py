"""Recipes by component, several of them, what they print, and what is refused with the right name beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from convnextv2.segmentation import SegmentOptions
from convnextv2.training import FinetuneOptions, PretrainOptions
from convnextv2.training.components import COMPONENTS, OTHER, component_of
from convnextv2.training.options import RunOptions
from convnextv2.training.recipe import option, parse_options, recipe_text

KINDS = (PretrainOptions, FinetuneOptions, SegmentOptions)
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return make


def parsed(*arguments: Any, kind: Any = PretrainOptions) -> Any:
    return parse_options(kind, [str(argument) for argument in arguments])


def test_every_option_belongs_to_one_component() -> None:
    known = {field.name for kind in KINDS for field in fields(kind)}
    listed = [name for names in COMPONENTS.values() for name in names]
    assert sorted(listed) == sorted(known)
    assert component_of("something_of_a_task_of_ones_own") == OTHER


def test_nested_flat_and_mixed_are_the_same(write: Write) -> None:
    flat = write(
        "model: convnextv2_base\nlr: 1e-3\nbetas: [0.5, 9e-1]\nimg_size: [64, 96]\nprecision: bf16\nepochs: 3\n"
    )
    nested = write(
        "model: {model: convnextv2_base}\noptimizer:\n  lr: 1e-3\n  betas: [0.5, 9e-1]\ndata: {img_size: 64x96}\n"
        "hardware: {precision: bf16}\nevaluation:\nrun: {epochs: 3}\n",
        "nested.yaml",
    )
    mixed = write(
        "model: convnextv2_base\noptimizer: {lr: 1e-3}\nbetas: [0.5, 9e-1]\nconfig: rest.yaml\n", "mixed.yaml"
    )
    write("img_size: 64x96\nhardware: {precision: bf16}\nepochs: 3\n", "rest.yaml")
    expected = PretrainOptions(
        model="convnextv2_base", lr=1e-3, betas=(0.5, 0.9), img_size=(64, 96), precision="bf16", epochs=3
    )
    assert [parsed("--config", path) for path in (flat, nested, mixed)] == [expected] * 3


def test_a_line_without_a_value(write: Write) -> None:
    assert parsed("--config", write("lr:\n")) == parsed("--config", write("hardware:\n")) == PretrainOptions()


def test_a_component_of_the_name_of_an_option(write: Write) -> None:
    path = write("optimizer: {optimizer: lion, lr: 2}\ndata: {data: digits}\n")
    options = parsed("--config", path)
    assert (options.optimizer, options.lr, options.data) == ("lion", 2.0, "digits")
    options = parsed("--config", write("optimizer: lion\ndata: digits\n"))
    assert (options.optimizer, options.data) == ("lion", "digits")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_printed_is_read_back(write: Write, capsys: pytest.CaptureFixture[str], kind: Any) -> None:
    given = ["--lr", "1e-5", "--dims", *"1234", "--img-size", "32x48", "--data", "дом: 1", "--tf32", "--init", "1e3"]
    with pytest.raises(SystemExit) as stop:
        parsed(*given, "--print-config", kind=kind)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    printed = yaml.safe_load(text)
    assert list(printed) == list(COMPONENTS)
    assert printed["optimizer"]["lr"] == 1e-5
    expected = parsed(*given, kind=kind)
    assert parsed("--config", write(text), kind=kind) == expected
    own = recipe_text(expected)  # config.yaml of a run
    assert not any(isinstance(value, dict) for value in yaml.safe_load(own).values())
    assert parsed("--config", write(own), kind=kind) == expected


def test_later_recipes_win_and_the_command_line_over_all(write: Write) -> None:
    first = write("epochs: 1\nseed: 1\nblr: 1\nmin_lr: 1\n", "a.yaml")
    second = write("run: {epochs: 2, seed: 2}\nblr: 2\n", "b.yaml")
    for arguments in (
        ["--config", first, second, "--epochs", "3"],
        ["--epochs", "3", "--config", first, "--config", second],
        [f"--config={first}", "--epochs=3", f"--config={second}"],
    ):
        options = parsed(*arguments)
        assert (options.epochs, options.seed, options.blr, options.min_lr) == (3, 2, 2.0, 1.0)


def test_a_recipe_builds_on_others_from_its_own_folder(write: Write) -> None:
    write("epochs: 3\nseed: 5\n", "base.yaml")
    write("seed: 6\n", "more.yaml")
    above = write("config: base.yaml\nepochs: 7\n", "above.yaml")
    below = write("epochs: 7\nconfig: base.yaml\n", "below.yaml")
    several = write("config: [../base.yaml, ../more.yaml]\n", "inner/several.yaml")
    found = [parsed("--config", path) for path in (above, below, several)]
    assert [(options.epochs, options.seed) for options in found] == [(7, 5), (3, 5), (3, 6)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epoks: 3", "there is no option epoks; did you mean epochs?"),
        ("optimizer: {bettas: [0, 0]}", "there is no option bettas; did you mean betas?"),
        ("optimiser: {lr: 1}", "there is no option optimiser; did you mean optimizer?"),
        ("model: {lr: 1}", "lr belongs to optimizer, not to model"),
        ("task: {lr: 1}", "lr belongs to optimizer, not to task"),
        ("lr: 1\noptimizer: {lr: 2}", "lr is given twice"),
        ("hardware: 3", "hardware should hold options, as in 'hardware: {device: …}'"),
        ("task: 3", "task should hold options"),
        ("optimizer: {optimizer: {lr: 1}}", "optimizer should be a value or a list of values"),
        ("epochs: {epochs: 1}", "epochs should be a value or a list of values"),
        ("1: 2", "there is no option 1"),
        ("optimizer: {[1, 2]: 2}", "is no valid YAML"),
        ("mixup: 1", "mixup is no option of this kind of run"),
        ("epochs: many", "epochs: Expected a int. Got value: many"),
        ("optimizer: {betas: 0.9}", "betas: expected a list of values, got 0.9"),
        ("betas: [a, b]", "betas: Expected a float. Got value: a"),
        ("config: recipe.yaml", "config goes in a circle"),
        ("config: ''", "config should name another recipe, got"),
        ("config: [[a]]", "config should name another recipe, got"),
        ("lr", "expected a recipe"),
        ("null: null", "there is no option None"),
        ("", "expected a recipe"),
        ("? [a]\n: 3", "is no valid YAML"),
        ("a: " + "[" * 5000, "is no valid YAML"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_that_names_file_and_option(write: Write, text: str, told: str) -> None:
    path = write(f"{text}\n")
    with pytest.raises(ValueError) as refused:  # the message is looked at below
        parsed("--config", path)
    message = str(refused.value)
    assert message.startswith(str(path))
    assert told in message
    assert "\n" not in message


def test_a_file_below_a_recipe_is_the_one_that_is_named(write: Write) -> None:
    path = write("config: inner/base.yaml\n")
    with pytest.raises(OSError, match=r"base\.yaml"):
        parsed("--config", path)
    inner = write("epoks: 3\n", "inner/base.yaml")
    with pytest.raises(ValueError, match="there is no option epoks") as refused:
        parsed("--config", path)
    assert str(refused.value).startswith(str(inner))
    write("config: ../recipe.yaml\n", "inner/base.yaml")
    with pytest.raises(ValueError, match="config goes in a circle"):
        parsed("--config", path)


def test_flags_of_components(write: Write) -> None:
    options = parsed("--optimizer.lr=0.5", "--hardware.no-tf32", "--run.epochs", "3", "--model.model", "m=n")
    assert (options.lr, options.tf32, options.epochs, options.model) == (0.5, False, 3, "m=n")
    for arguments, told in [
        (["--model.lr", "1"], "--lr belongs to optimizer, not to model"),
        (["--optimizer.lt", "1"], "there is no option --lt; did you mean --lr?"),
        (["--epoks=3"], "there is no option --epoks; did you mean --epochs?"),
        (["--batch_size", "3"], "there is no option --batch_size; did you mean --batch-size?"),
        (["--print_config"], "there is no option --print_config; did you mean --print-config?"),
        (["--epoch", "3"], "there is no option --epoch; did you mean --epochs?"),
        (["--mixup", "3"], "--mixup is no option of this kind of run"),
        (["--optimizer.", "3"], "there is no option --optimizer.; did you mean --optimizer?"),
        (["--lr", "abc"], "--lr: Expected a float. Got value: abc"),
        (["--config"], "expected at least one argument"),
    ]:
        with pytest.raises(ValueError, match=told.replace("?", r"\?")) as refused:
            parsed(*arguments)
        assert "\n" not in str(refused.value)


@dataclass(frozen=True, kw_only=True)
class OwnOptions(RunOptions):
    """Options of a task of one's own."""

    blr: float = option(1.0, "base rate")
    depth_of_thought: int = option(1, "how deep")


def test_options_of_a_task_of_ones_own(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("task: {depth_of_thought: 5}\n")
    assert parsed("--config", path, kind=OwnOptions).depth_of_thought == 5
    assert parsed("--task.depth-of-thought", "6", kind=OwnOptions).depth_of_thought == 6
    with pytest.raises(SystemExit):
        parsed("--config", path, "--print-config", kind=OwnOptions)
    assert yaml.safe_load(capsys.readouterr().out)["task"] == {"depth_of_thought": 5}


def test_help_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    lines = capsys.readouterr().out.splitlines()
    places = [lines.index(f"{name}:") for name in COMPONENTS]
    assert places == sorted(places)
    rate = next(number for number, line in enumerate(lines) if line.startswith("  --lr "))
    assert lines.index("optimizer:") < rate < lines.index("hardware:")

"""What a file declares becomes parts, each known by what determines its numbers; mistakes are told in one line."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from study_helpers import tiny_study, write_study

from convnextv2.data.decoding import Wanted
from studies import __main__ as program
from studies.declaration import HERE, read_study
from studies.images import count_images
from studies.parts import FREE, Part


def part(**changes: Any) -> Part:
    values: dict[str, Any] = {"kind": "finetune", "seed": 0, "given": {"epochs": 3, "blr": 0.01}, "data": "digits"}
    return Part(**{**values, "images": {}, **changes})


SHAPE: dict[str, Any] = {"dims": (4, 4, 8, 8), "depths": (1, 1, 1, 1)}


def test_results_that_are_kept_are_still_known() -> None:
    """An option that is new changes every hash, and what was measured is measured again: see LATER of the parts."""
    assert part(kind="pretrain", given={}).key == "2d578d6d092623d3"
    assert part(kind="finetune", given={}).key == "43bfe78b127354d2"
    assert part(kind="pretrain", given={"crop_scale": (0.5, 1.0)}).key != "2d578d6d092623d3"


def test_the_hash_is_of_what_determines_the_numbers() -> None:
    key = part().key
    same = [{"blr": 0.01, "epochs": 3}, {"epochs": 3, "blr": 0.01, "smoothing": 0.1}, {"epochs": 3, "blr": 1e-2}]
    same += [{"epochs": 3, "blr": 0.01, "img_size": None, "mixup": 0}]
    free = {"workers": 7, "device": "cpu", "max_bad": 0.5}
    assert set(free) <= set(FREE)
    same += [{"epochs": 3, "blr": 0.01, **free}]
    assert {part(given=given).key for given in same} == {key}
    other = [{"given": {"epochs": 4, "blr": 0.01}}, {"given": {"epochs": 3, "blr": 0.01, "img_size": 32}}, {"seed": 1}]
    other += [{"given": {"epochs": 3, "blr": 0.01, "cache": "here"}}]
    assert part(given={"epochs": 3, "blr": 0.01, "cache": "there"}).key == part(**other[-1]).key
    other += [{"kind": "pretrain"}, {"images": {"labels": 0.1, "seed": 0}}, {"variant": "no-grn"}]
    other += [{"needs": part(kind="pretrain")}, {"needs": part(kind="pretrain", seed=1)}]
    keys = {part(**changes).key for changes in other}
    assert key not in keys
    assert len(keys) == len(other)


def test_images_are_known_by_names_and_sizes_not_by_their_place(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, size in zip(folders, (3, 3, 4), strict=True):
        (folder / "x").mkdir(parents=True)
        (folder / "x" / "1.png").write_bytes(b"." * size)
    first, moved, other = (part(data=str(folder)).key for folder in folders)
    assert first == moved != other


def test_features_depend_on_the_encoder_alone() -> None:
    shape = SHAPE
    knn = part(kind="knn", given=shape)
    assert part(kind="knn", given={**shape, "epochs": 9, "blr": 7.0}).key == knn.key
    assert part(kind="knn", given={**shape, "dims": (4, 4, 8, 9)}).key != knn.key
    before = part(kind="pretrain", given={**shape, "epochs": 1})
    after = part(kind="pretrain", given={**shape, "epochs": 2})
    assert len({part(kind="knn", given=shape, needs=needs).key for needs in (None, before, after)}) == 3


def test_arms_share_what_they_have_in_common(tmp_path: Path) -> None:
    arms = {"a": {}, "b": {"finetune": {"smoothing": 0.2}}, "c": {"pretrain": None}, "d": {"pretrain": {"epochs": 3}}}
    questions = {"one": {"arms": arms}, "two": {"arms": {"again": {}}, "labels": [1], "measures": ["linear"]}}
    study = tiny_study(tmp_path, questions=questions, seeds=[4, 9])
    assert Counter(part.kind for part in study.parts) == {"pretrain": 4, "knn": 12, "finetune": 16, "linear": 2}
    order = [part.key for part in study.parts]
    assert all(order.index(part.needs.key) < order.index(part.key) for part in study.parts if part.needs)
    assert [part.seed for part in study.parts] == [4] * 17 + [9] * 17
    assert len(study.cells) == 2 * (4 * 2 * 2 + 1)


def test_layers_of_options(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: 10\nblr: 0.5\nimg_size: 64\nwarmup_epochs: 4\n")
    arms = {"a": {}, "b": {"finetune": {"blr": 0.25}}, "c": {"pretrain": None, "budget_of_pretraining": 0.5}}
    question = {"arms": arms, "labels": [1, 0.1], "seeds": 3, "measures": ["finetune"], "held_out": 0.25}
    changes: dict[str, Any] = {"finetune": {"recipe": "recipe.yaml", "smoothing": 0.0}, "questions": {"x": question}}
    changes["scales"] = {"smoke": {"seeds": 2, "labels": [0.1], "epochs": 0.5, "images": 60, "finetune": {"accum": 2}}}
    study = tiny_study(tmp_path, **changes)
    a, b, c = (study.cells[index].part for index in range(3))
    assert {part.seed for part in study.parts} == {0, 1}
    assert a.images == {"held_out": 0.25, "images": 60, "labels": 0.1, "seed": 0}
    assert a.needs is not None
    assert a.needs.images == {"held_out": 0.25, "images": 60}
    assert a.given["epochs"] == 5
    assert a.given["warmup_epochs"] == 2
    assert (a.given["img_size"], a.given["smoothing"], a.given["accum"], a.given["blr"]) == (16, 0.0, 2, 0.5)
    assert b.given == {**a.given, "blr": 0.25}
    assert c.given["epochs"] == 5 + 5  # one epoch of pre-training on ten times as many images at half the price
    assert c.needs is None


def test_a_whole_budget_has_the_passes_of_both(tmp_path: Path) -> None:
    """With as many passes an epoch as `min_steps` takes in the run that it is compared with."""
    arms = {"a": {}, "b": {"pretrain": None, "budget_of_pretraining": 0.5}}
    tuning = {"epochs": 10, "min_steps": 100, "batch_size": 4, "warmup_epochs": 0}
    question = {"arms": arms, "labels": [0.25], "measures": ["finetune"]}
    study = tiny_study(tmp_path, finetune=tuning, pretrain={"epochs": 20}, questions={"x": question})
    ours, rival = (cell.part for cell in study.cells)
    images = count_images(ours.options().data, 1, (16, 16), Wanted())
    assert ours.passes == 10 * math.ceil(10 * 4 / images) > 10  # 10 steps of 4 an epoch
    assert rival.passes == ours.passes + 0.5 * 20 / 0.25
    assert rival.given["epochs"] == rival.passes


def test_a_scale_shortens_the_cooldown(tmp_path: Path) -> None:
    run = {"epochs": 10, "schedule": "constant", "cooldown_epochs": 4, "warmup_epochs": 2}
    study = tiny_study(tmp_path, finetune=run, scales={"smoke": {"epochs": 0.5}})
    tuning = next(part for part in study.parts if part.kind == "finetune")
    assert [tuning.given[name] for name in ("epochs", "cooldown_epochs", "warmup_epochs")] == [5, 2, 1]


def test_untrained_features_are_known_by_how_images_are_read() -> None:
    usual = part(kind="knn", given=SHAPE)
    assert part(kind="knn", given={**SHAPE, "vflip": 0.5}).key == usual.key
    others = {part(kind="knn", given={**SHAPE, **how}).key for how in ({"pixels": "photo"}, {"bands": "3,2,1"})}
    assert len(others | {usual.key}) == 3


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a key": ({"qestions": {}}, "tiny.yaml: `qestions` is not known; the nearest is `questions`"),
    "an option": ({"options": {"imgsize": 3}}, "options: `imgsize` is not known; the nearest is `img_size`"),
    "an option of the other run": (
        {"pretrain": {"smoothing": 0.1}}, "declaration: pretrain: `smoothing` is not known; the nearest is `",
    ),
    "an option that is set": ({"pretrain": {"seed": 1}}, "declaration: pretrain: `seed` is set by the study itself"),
    "seeds of text": ({"seeds": ["0", "1"]}, "seeds: expected whole numbers from 0 to .*'0', '1'"),
    "no seed": ({"seeds": 0}, "seeds: expected numbers from 1 to 1000"),
    "a seed twice": ({"seeds": [1, 1]}, "seeds: expected whole numbers"),
    "seeds that are true": ({"seeds": [True]}, "seeds: expected whole numbers"),
    "endless epochs": ({"scales": {"smoke": {"epochs": float("inf")}}}, "scale smoke: epochs: expected numbers from"),
    "seeds as text": ({"seeds": "3"}, "`seeds` must be int or list, got '3'"),
    "labels": ({"labels": [0.0, 1]}, "labels: expected numbers from 1e-06 to 1"),
    "a measure": ({"measures": ["knnn"]}, "measures: `knnn` is not known; the nearest is `knn`"),
    "a variant": (
        {"questions": {"x": {"arms": {"a": {"variant": "leeking"}}}}}, "the nearest is `leaking`",
    ),
    "a value": ({"pretrain": {"epochs": 2, "mask_ratio": "0.5"}}, "`mask_ratio` must be float, got '0.5'"),
    "a range": ({"finetune": {"smoothing": 1.5}}, "`smoothing` must be at least 0 and below 1.0, got 1.5"),
    "epochs": ({"finetune": {"epochs": "many"}}, "epochs: expected whole numbers from 1"),
    "an arm": ({"questions": {"x": {"arms": {"a": 3}}}}, "tiny.yaml: x: a: expected names, got 3"),
    "arms": ({"questions": {"x": {"arms": {0.4: {}}}}}, "tiny.yaml: x: arms: expected names"),
    "no arms": ({"questions": {"x": {}}}, r"tiny.yaml: x: .*missing 1 required .* 'arms'"),
    "nothing": ({"questions": {"x": {"arms": {}}}}, "no question has an arm"),
    "labels that no scale leaves": (
        {"scales": {"smoke": {"labels": [0.5]}}}, "labels: labels that the scale leaves: expected numbers",
    ),
    "no scale": ({"scales": {"smok": {}}}, "scale: `smoke` is not known; the nearest is `smok`"),
    "a question": (
        {"scales": {"smoke": {"questions": ["label"]}}}, "`label` is not known; the nearest is `labels`",
    ),
    "no images": ({"data": "nowhere"}, "nowhere: no such folder; expected a folder of images or"),
    "a recipe": ({"finetune": {"recipe": "none.yaml"}}, "none.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told_in_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, message = WRONG[name]
    file = write_study(tmp_path, **changes)
    status = program.main(["status", str(file), "--scale", "smoke", "--output", str(tmp_path / "all")])
    told = capsys.readouterr().err
    assert status == 2
    assert told.count("\n") == 1
    assert re.search(message, told), told
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "x: &x [*x]", "\x00", "text"])
def test_files_that_are_no_studies(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    assert program.main(["run", str(tmp_path / "odd.yaml"), "--output", str(tmp_path / "all")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("file", sorted(HERE.glob("*.yaml")), ids=lambda file: file.stem)
def test_studies_of_the_project_are_declared_rightly(file: Path) -> None:
    for scale in ("full", *yaml.safe_load(file.read_text())["scales"]):
        study = read_study(file.stem, scale, "digits")
        assert {cell.question for cell in study.cells} == set(study.questions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--free", "workers=many"], "`workers` must be int, got 'many'"),
        (["--free", "epochs=1"], "--free takes workers, device"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--scale", "smok"], "scale: `smok` is not known; the nearest is `smoke`"),
        (["--data", "{data}", "--output", "{data}/runs"], "runs lies in the images"),
    ],
)
def test_wrong_arguments_of_a_run(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "x").mkdir(parents=True)
    given = [argument.format(data=tmp_path / "data") for argument in arguments]
    command = ["run", str(write_study(tmp_path)), "--scale", "smoke", "--output", str(tmp_path / "all"), *given]
    assert program.main(command) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
    assert not (tmp_path / "all").exists()

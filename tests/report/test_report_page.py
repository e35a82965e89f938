"""The page of a report: what it shows, that all of it is text and of one piece, and what happens to damaged runs."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from report_helpers import HOSTILE, SESSION, finetuning, noise, pretraining, written

from convnextv2.files import write_json
from convnextv2.report import report
from convnextv2.report.page import dash, duration, facts, wrapped
from convnextv2.report.pictures import ALL_PICTURES, MOST_EPOCHS
from convnextv2.report.runs import read_run
from convnextv2.training.environment import NAME

EMPTY = {"meta", "link", "img", "input", "br"}


ROW = re.compile(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', re.S)


class Page(HTMLParser):
    """Elements, attributes and texts of a page whose tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.within: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.source = text
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.within.setdefault(self._open[-1] if self._open else "", []).append(data)
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(*runs: Path) -> tuple[Page, list[str]]:
    text, notices = report(runs)
    return Page(text), notices


def table(page: Page) -> dict[str, list[str]]:
    """Cells of the rows of all tables, by their headings."""
    return {heading: re.findall(r"<td[^>]*>(.*?)</td>", rest) for heading, rest in ROW.findall(page.source)}


def test_one_piece_that_needs_nothing_else(tmp_path: Path) -> None:
    runs = pretraining(tmp_path / "a"), finetuning(tmp_path / "b")
    text, notices = report(runs)
    page = Page(text)
    assert notices == []
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert len(addresses) > 8
    assert all(re.match(r"#\w+$|data:(image/(webp|jpeg);base64,|,$)", value) for value in addresses)
    assert {value[1:] for value in addresses if value.startswith("#")} <= {a.get("id") for _, a in page.elements}
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"\w://(?!www\.w3\.org/2000/svg)", text)
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    for name in ("script", "style"):
        (content,) = page.within[name]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
        assert len(page.all(name)) == 1
    assert all(image["alt"] and int(image["width"]) and int(image["height"]) for image in page.all("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert not any(name == "style" or name.startswith("on") for _, a in page.elements for name in a)


def test_all_columns_that_change_are_drawn_with_all_runs(tmp_path: Path) -> None:
    page, _ = page_of(pretraining(tmp_path / "a"), pretraining(tmp_path / "b", epochs=2), finetuning(tmp_path / "c"))
    drawn = {
        figure["data-plot"]: label
        for figure, label in zip([a for a in page.all("figure") if "data-plot" in a], page.within["code"], strict=False)
    }
    lines = {label: [len(points) for points in json.loads(data)["lines"]] for data, label in drawn.items()}
    assert lines == {
        "loss": [4, 2, 0], "train_loss": [0, 0, 5], "val_loss": [0, 0, 5], "val_top1": [0, 0, 5],
        "feature_diversity": [4, 2, 0], "lr": [4, 2, 5], "images_per_s": [4, 2, 5], "data_wait": [4, 2, 5],
        "seconds": [4, 2, 5],
    }  # fmt: skip
    described = next(svg["aria-label"] for svg in page.all("svg") if svg.get("aria-label", "").startswith("recon"))
    assert described == (
        "reconstruction loss over the epochs. a: from 1 to 0.25, between 0.25 and 1; "
        "b: from 1 to 0.5, between 0.5 and 1."
    )
    assert "a, epoch 2: 2 %" in page.within["title"], "a share is told in per cent"
    assert "2 min 5 s" not in page.text
    assert "5 min 0 s" in page.text, "of the fine-tuning"
    assert "validation, top-1" in page.text


def test_recipes_and_environments_tell_what_differs_first(tmp_path: Path) -> None:
    runs = pretraining(tmp_path / "a"), pretraining(tmp_path / "b", mask_ratio=0.75, batch_size=8)
    write_json(
        runs[1] / NAME,
        {"sessions": [SESSION, {**SESSION, "device": "cuda:0", "command": "python b.py", "after_step": 3}]},
    )
    text, _ = report(runs)
    recipes = text[text.index('id="recipes"') : text.index('id="environment"')]
    differing, others = recipes.split("<details>")
    names = re.findall(r'<th scope="row">(\w+)</th>', differing)
    assert set(names) == {"mask_ratio", "batch_size", "output"}
    assert names[-1] == "output"
    assert '<td>0.6</td><td class="unusual">0.75</td>' in differing
    assert "<td>none</td>" in others
    environment = text[text.index('id="environment"') : text.index('id="commands"')]
    assert "<td>cpu</td><td>cuda:0</td>" in environment.split("<details>")[0]
    assert "<td>2.11.0</td><td>2.11.0</td>" in environment.split("<details>")[1]
    commands = text[text.index('id="commands"') : text.index('id="numbers"')]
    assert commands.count("python b.py") == 1
    assert commands.count("Resumed after step 3: ") == 1
    assert f"--config {runs[0]}/config.yaml" in commands


def test_of_a_single_run_the_recipe_tells_what_is_not_the_default(tmp_path: Path) -> None:
    text, _ = report([finetuning(tmp_path / "a", smoothing=0.3)])
    differing = text[text.index('id="recipes"') : text.index('id="environment"')].split("<details>")[0]
    assert re.findall(r'<th scope="row">(\w+)</th><td>(.+?)</td>', differing)[:2] == [
        ("epochs", "5"),
        ("smoothing", "0.3"),
    ]


def test_an_option_of_one_kind_alone_differs_where_it_is_unusual(tmp_path: Path) -> None:
    runs = pretraining(tmp_path / "a", mask_ratio=0.5), finetuning(tmp_path / "b", linear_probe=True, init="x")
    text, _ = report(runs)
    differing = text[text.index('id="recipes"') : text.index('id="environment"')].split("<details>")[0]
    names = re.findall(r'<th scope="row">(\w+)</th>', differing)
    assert {"mask_ratio", "linear_probe", "blr"} <= set(names)
    assert "decoder_depth" not in names
    assert "linear probe" in text


def test_names_of_others_are_text_and_nothing_else(tmp_path: Path) -> None:
    run = pretraining(tmp_path / HOSTILE.replace("/", "∕"), tracker=None, init=HOSTILE)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 5, HOSTILE: 1, "</title>": 2}) + "\n")
        file.write(json.dumps({"epoch": 6, HOSTILE: 2, "</title>": 3}) + "\n")
    write_json(run / NAME, {"sessions": [{HOSTILE: HOSTILE, "command": HOSTILE, "versions": {HOSTILE: HOSTILE}}]})
    other = finetuning(tmp_path / "b", classes=(HOSTILE, "plain"))
    page, _ = page_of(run, other)
    assert Counter(name for name, _ in page.elements)["script"] == 1
    assert page.text.count("<img src=x onerror=alert(1)>") >= 8
    assert "{{7*7}}" in page.text
    assert all(set(image) == {"src", "width", "height", "alt"} for image in page.all("img"))


def test_names_that_are_no_text_and_endless_ones(tmp_path: Path) -> None:
    run = pretraining(tmp_path / "caf\udce9")
    long = pretraining(tmp_path / "b", init="x" * 100_000)
    text, _ = report([run, long])
    assert "caf\\xe9" in text
    assert text.encode()
    assert "x" * 301 not in text


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretraining(tmp_path_factory.mktemp("whole") / "run", drawn=(2,))


def breaks(name: str) -> Callable[[Path], None]:
    """What damages a run, by its name."""

    def append(line: bytes) -> Callable[[Path], None]:
        return lambda run: (run / "metrics.jsonl").open("ab").write(line) and None

    def put(file: str, content: bytes) -> Callable[[Path], None]:
        return lambda run: (run / file).write_bytes(content) and None

    def replaced_by_folder(run: Path) -> None:
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").mkdir()

    return {
        "cut": append(b'{"epoch": 5, "lo'),
        "no row": append(b"[1]\n{}\n17\n"),
        "nan": append(b'{"epoch": 5, "loss": NaN, "lr": null}\n{"epoch": 6, "loss": 1e999}\n'),
        "huge": append(b'{"epoch": 5, "loss": 1' + b"0" * 400 + b"}\n"),
        "deep": append(b"[" * 100_000 + b"\n"),
        "twice": append(b'{"epoch": 4, "loss": 0.5}\n'),
        "bytes": append(b"\xff\xfe\n"),
        "no rows": lambda run: (run / "metrics.jsonl").unlink(),
        "folder": replaced_by_folder,
        "no recipe": lambda run: (run / "config.yaml").unlink(),
        "recipe": put("config.yaml", b"a: [1"),
        "list": put("config.yaml", b"- 1\n"),
        "aliases": put("config.yaml", b"a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
        "picture": put("reconstructions/epoch_0002.png", b"no picture"),
        "no pictures": lambda run: [path.unlink() for path in (run / "reconstructions").iterdir()] and None,
        "bomb": lambda run: Image.new("1", (10_000, 10_000)).save(run / "reconstructions/epoch_0002.png"),
        "sessions": put(NAME, b"{}"),
        "classes": put("class_indices.json", b'{"0": 1}'),
        "running": lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1, "loss": 1}\n') and None,
    }[name]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("cut", "metrics.jsonl: line 5 is damaged and left out"),
        ("no row", "metrics.jsonl: line 5 is no row of a run and left out, and 2 more like it"),
        ("nan", "loss is no finite number, or too large to draw, in 2 of 6 epochs"),
        ("huge", "loss is no finite number, or too large to draw, in 1 of 5 epochs"),
        ("deep", "metrics.jsonl: line 5 is no row of a run and left out"),
        ("twice", "some epochs are there more than once"),
        ("bytes", "line 5 is damaged"),
        ("no rows", "no epoch is recorded yet"),
        ("folder", "metrics.jsonl: is no file"),
        ("no recipe", "config.yaml: is missing"),
        ("recipe", "config.yaml: left out: is no valid YAML"),
        ("list", "config.yaml: left out: expected a recipe"),
        ("aliases", "should be a value or a list of values"),
        ("picture", "reconstructions/epoch_0002.png: left out: not an image"),
        ("no pictures", "reconstructions: none were drawn yet"),
        ("bomb", "reconstructions/epoch_0002.png: left out: 10000×10000 pixels"),
        ("sessions", "environment.json: left out, as it holds no list of sessions"),
        ("classes", "class_indices.json: left out: is no mapping"),
        ("running", "1 of 4 epochs: still running, or stopped"),
    ],
)
def test_damage_is_a_notice_and_the_rest_is_shown(damage: str, told: str, whole: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(whole, tmp_path / name)
    run = tmp_path / "a"
    breaks(damage)(run)
    page, notices = page_of(run, tmp_path / "b")
    assert len([line for line in notices if told in line]) == 1, notices
    assert all(line.startswith("a: ") for line in notices), notices
    assert len(notices) == (2 if damage in ("nan", "folder") else 1), notices
    assert told in page.text
    assert "b, epoch 4: 0.25" in page.within["title"]
    assert "Traceback" not in page.text


def test_rows_in_any_order_are_a_run(tmp_path: Path) -> None:
    rows = [{"epoch": epoch, "loss": loss} for epoch, loss in ((3, 0.3), (1, 0.9), (2, 0.7), (3, 0.5))]
    run = read_run(written(tmp_path / "a", "mask_ratio: 0.6\nepochs: 3\n", rows), "a")
    assert run.values("loss") == [(1, 0.9), (2, 0.7), (3, 0.5)]
    assert (run.epochs, run.planned, run.last("loss")) == (3, 3, 0.5)


def test_the_best_epoch_is_that_of_the_run_and_one_without_patience_is_over(tmp_path: Path) -> None:
    rows = [{"epoch": epoch, "train_loss": 1.0, "val_loss": loss, "val_top1": top1}
            for epoch, top1, loss in ((1, 90.0, 0.5), (2, 90.0, 0.3), (3, 80.0, 0.1), (4, 90.0, 0.4))]  # fmt: skip
    for patience, over in ((2, True), (3, False)):
        recipe = f"smoothing: 0.1\nepochs: 9\npatience: {patience}\n"
        one = read_run(written(tmp_path / str(patience), recipe, rows), "a")
        assert ("best top-1", "90.00 % (epoch 2)") in facts(one)
        assert any("still running" in notice for notice in one.notices) != over


def test_runs_of_which_nothing_is_there_yet(tmp_path: Path) -> None:
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    page, notices = page_of(tmp_path / "a")
    assert notices == ["a: no epoch is recorded yet: there are no curves", "a: config.yaml: is missing"]
    assert "No recipe could be read." in page.text
    assert "Not recorded" in page.text
    one = written(tmp_path / "b", "mask_ratio: 0.6\nepochs: many\n", [{"epoch": 1, "loss": 0.5}])
    page, notices = page_of(one)
    assert notices == ["b: reconstructions: none were drawn yet, or they are missing"]
    assert not [figure for figure in page.all("figure") if "data-plot" in figure], "one point is no curve"


def test_pictures_are_small_enough_whatever_they_show(tmp_path: Path) -> None:
    """Three runs of noise, which no coding makes small."""
    runs = [pretraining(tmp_path / name, drawn=()) for name in "abc"]
    for run in runs:
        source = noise(run / "reconstructions" / "epoch_0001.png", 420, 425)
        for epoch in range(2, 13):
            (run / "reconstructions" / f"epoch_{epoch:04d}.png").symlink_to(source)
        noise(run / "neighbours.png", 450, 350)
    text, _ = report(runs)
    page = Page(text)
    assert 1e6 < len(text.encode()) < 5e6
    sources = [image["src"].partition(",")[2] for image in page.all("img")]
    assert len(sources) == 3 * (MOST_EPOCHS + 1)
    assert sum(len(base64.b64decode(source)) for source in sources) < ALL_PICTURES
    epochs = [figure["data-epoch"] for figure in page.all("figure") if "data-epoch" in figure]
    assert (epochs[0], epochs[MOST_EPOCHS - 1], len(set(epochs))) == ("1", "12", MOST_EPOCHS)
    assert "8 of 12 that were drawn." in page.text
    with Image.open(io.BytesIO(base64.b64decode(sources[0]))) as picture:
        shown = next(image for image in page.all("img"))
        assert picture.size == (int(shown["width"]), int(shown["height"]))


def test_headings_are_written_where_those_of_the_picture_are_cut_off(tmp_path: Path) -> None:
    run = pretraining(tmp_path / "a", drawn=(4,))
    noise(run / "reconstructions" / "epoch_0002.png", 300, 200)
    page, _ = page_of(run)
    heights = [int(image["height"]) for image in page.all("img")]
    with Image.open(run / "reconstructions" / "epoch_0004.png") as whole:
        assert heights == [200, whole.height - 34]
    assert page.within["span"].count("prediction + visible") == 1


def test_rows_and_long_runs(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"epoch": e, "loss": 1.0 / e, "note": "words", "on": True} for e in range(1, 5001)]
    run = written(tmp_path / "a", "mask_ratio: 0.6\nepochs: 5000\nreconstruct_every: 0\n", rows)
    text, _ = report([run])
    page = Page(text)
    assert len(text) < 200_000
    assert "a: 60 of 5000 epochs" in page.text
    assert "words" not in page.text
    headings = [value for value in page.within["th"] if value in ("epoch", "loss", "note", "on")]
    assert headings == ["epoch", "loss"]


def test_what_no_run_would_write(tmp_path: Path) -> None:
    """Thousands of columns, a value of a recipe that is no text."""
    rows = [{"epoch": epoch, **{f"c{place}": epoch * place for place in range(3000)}} for epoch in (1, 2)]
    run = written(tmp_path / "a", "epochs: 9\n.nan: .nan\n2026-01-01: [1, null]\n", rows)
    (run / NAME).write_text(
        json.dumps({"sessions": [{}, {"started": None, "command": 5, "x": "\ud800", "y": [1], "versions": 3}]})
    )
    os.utime(run / "metrics.jsonl", (0, 0))
    page, notices = page_of(run)
    assert notices == ["a: 2 of 9 epochs: still running, or stopped; the last was recorded on 1970-01-01 at 00:00 UTC"]
    assert len([figure for figure in page.all("figure") if "data-plot" in figure]) == 60
    assert "2939 more columns change." in page.text
    assert table(page)["x"] == ["\\ud800"]
    assert table(page)["2026-01-01"] == ["1 none"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (7300, "2 h 1 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_of_many_runs_differ() -> None:
    looks = [(place % 8, dash(place)) for place in range(32)]
    assert len(set(looks)) == 32
    assert all(a != b for (_, a), (_, b) in itertools.pairwise(looks))


def test_a_command_over_lines_is_the_same_command() -> None:
    command = "python 'a b.py' --data 'it'\"'\"'s' --n 1 2 -x --on"
    assert shlex.split(wrapped(command).replace("\\\n", "")) == shlex.split(command)
    assert wrapped(command).count("\n") == 3
    assert wrapped("it's no command") == "it's no command"

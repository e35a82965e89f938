"""``scripts/report.py``: where the page goes, which runs are in it, and what is told; runs stay as they are."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from convnextv2.report.page import START
from convnextv2.training import FinetuneOptions, PretrainOptions, finetune, pretrain

SMALL: dict[str, Any] = {
    "depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "img_size": 32, "patch_size": 16, "batch_size": 4, "epochs": 2,
    "workers": 0, "device": "cpu", "data": "photos",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs as they really are, and what may lie beside them."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("reported")
    for number, name in enumerate(("red", "green")):
        (folder / "photos" / name).mkdir(parents=True)
        for index in range(4):
            pixels = np.full((32, 32, 3), 20 * index, np.uint8)
            pixels[..., number] += 100
            Image.fromarray(pixels).save(folder / "photos" / name / f"{index}.png")
    images = {"data": str(folder / "photos")}
    pretrain(PretrainOptions(**{**SMALL, **images, "decoder_dim": 8, "output": str(folder / "runs" / "pre")}))
    finetune(FinetuneOptions(**{**SMALL, **images, "in_chans": 3, "output": str(folder / "runs" / "fine")}))
    (folder / "runs" / "notes").mkdir()
    (folder / "runs" / "old.html").write_text(START)
    (folder / "mine.html").write_text("<p>mine")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def digests(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_a_page_about_the_runs_among_what_is_named(place: Path, script: Any) -> None:
    before = digests(place)
    result = script("report", *sorted(Path("runs").iterdir()), "runs/pre/", place / "runs" / "pre")
    assert result.status == 0
    text = (place / "report.html").read_text(encoding="utf-8")
    assert text.startswith(START)
    size = len(text.encode()) / 1e6
    assert result.out == f"report of 2 runs, {size:.1f} MB: report.html\n"
    assert result.err.splitlines() == [f"notice: runs/{name}: left out: holds no run" for name in ("notes", "old.html")]
    assert text.count('<article class="card run-0">') == 2, "a card, and a confusion matrix"
    assert "after epoch 2" in text
    for told in ("reconstruction loss", "validation, top-1", "feature diversity", "environment.json", "backend"):
        assert (told in text) == (told != "environment.json"), told
    (place / "report.html").unlink()
    assert digests(place) == before


def test_an_earlier_report_is_replaced_and_a_run_may_hold_its_own(place: Path, script: Any) -> None:
    (place / "runs/pre/report.html").write_text(START)
    for output, more in (("runs/pre/report.html", ()), ("new/place.htm", ()), ("mine.html", ("--overwrite",))):
        assert script("report", "runs/pre", "--output", output, *more).status == 0
        text = Path(output).read_text(encoding="utf-8")
        assert text.startswith(START)
        assert len(text) > 10_000


def test_a_stream_is_written_to(place: Path, script: Any) -> None:
    with (place / "stream").open("wb") as stream:
        result = script("report", "runs/fine", "--output", f"/dev/fd/{stream.fileno()}")
    assert (place / "stream").read_text(encoding="utf-8").startswith(START)
    assert (result.status, result.out) == (0, "")
    assert result.err.startswith("report of 1 run, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/none"], "runs/none: No such file"),
        (["runs/pre", "runs/none"], "runs/none: No such file"),
        (["runs/notes"], "runs/notes: holds no run; name the folder"),
        (["runs"], "runs: holds no run"),
        (["runs/old.html"], "runs/old.html: holds no run"),
        (["runs/pre", "--output", "mine.html"], "mine.html: exists and is not a report"),
        (["runs/pre", "--output", "runs/pre/config.yaml"], "ends in .html, .htm, not in .yaml"),
        (["runs/pre", "--output", "runs"], "runs: is a folder; name a file in it"),
        (["runs/pre", "runs/old.html", "--output", "runs/old.html", "--overwrite"], "is one of the inputs"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, place: Path, script: Any
) -> None:
    before = digests(place)
    result = script("report", *arguments)
    (error,) = result.err.splitlines()
    assert result.status == 2
    assert error.startswith("error: ")
    assert message in error
    assert digests(place) == before


def test_damage_is_told_beside_the_result(place: Path, script: Any) -> None:
    (place / "runs/pre/config.yaml").write_text("- 1")
    (place / "runs/pre/metrics.jsonl").open("a").write("broken\n")
    result = script("report", "runs/pre")
    assert result.status == 0
    assert result.out.startswith("report of 1 run, ")
    assert [line.partition(": pre: ")[2].partition(":")[0] for line in result.err.splitlines()] == [
        "config.yaml", "metrics.jsonl",
    ]  # fmt: skip

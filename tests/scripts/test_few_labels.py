"""The benchmark of few labels: what it draws, and that it measures each part once."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from few_labels import draw_share  # noqa: E402  # a script's folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 3)):
        for number, name in enumerate(("green", "red")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 80, (40, 48, 3), dtype=np.uint8)
                pixels[..., number] += 150
                Image.fromarray(pixels).save(folder / part / name / f"{part}{index}.png")
    return folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.png")}


def test_shares_are_nested_and_nothing_held_out_is_drawn(data: Path, tmp_path: Path) -> None:
    few, more = (names(draw_share(data, percent, 1, tmp_path / str(percent)) / "train") for percent in (1, 40))
    assert (len(few), len(more)) == (2, 8)
    assert few < more
    assert names(draw_share(data, 40, 2, tmp_path / "other") / "train") != more
    whole = draw_share(data, 100, 0, tmp_path / "whole", held_out=4)
    assert len(names(whole / "train")) == 12
    assert len(names(whole / "val")) == 8
    assert names(whole / "train").isdisjoint(names(whole / "val"))
    assert names(data / "train") == names(whole / "train") | names(whole / "val")


@pytest.mark.slow
def test_parts_are_measured_once_and_gathered(data: Path, tmp_path: Path) -> None:
    small = "--depths 1 1 1 1 --dims 8 8 16 16 --img-size 32 --patch-size 8 --batch-size 4 --epochs 2 --workers 0"
    command = [sys.executable, ROOT / "benchmarks" / "few_labels.py", data, "unused", tmp_path / "out"]
    command += [
        "--percent",
        50,
        "--seeds",
        0,
        1,
        "--ways",
        "probe-untrained",
        "scratch",
        "--json",
        tmp_path / "out.json",
    ]
    command += [*small.split(), "--device", "cpu", "--lr", 0.01, "--hflip", 0]
    for _ in range(2):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    assert "{" not in done.stdout  # nothing is measured again
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(part["way"], part["seed"], part["images"]) for part in found["results"]] == [
        ("probe-untrained", 0, 10), ("probe-untrained", 1, 10), ("scratch", 0, 10), ("scratch", 1, 10),
    ]  # fmt: skip
    assert found["results"][0]["top1"].keys() == {"mean", "mean and std"}
    assert found["results"][0]["top1"]["mean"] == 100
    assert found["results"][2]["top1"]["steps"] == 4
    assert found["hardware"]["scikit-learn"]
    assert done.stdout.count("\n| 50 % |") == 3

"""Plots of the report: which columns, in which units, and where their lines run."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from convnextv2.report.curves import BOTTOM, LEFT, MOST_POINTS, RIGHT, TOP, Plot, plots, short
from convnextv2.report.runs import Run, short_names


def run_of(column: str, values: list[Any], name: str = "a") -> Run:
    return Run(Path(name), name, rows=[{"epoch": place, column: value} for place, value in enumerate(values, 1)])


def plot_of(column: str, *runs: list[Any]) -> Plot:
    (plot,) = plots([run_of(column, values, name) for name, values in zip("abcd", runs, strict=False)])
    return plot


@pytest.mark.parametrize(
    ("column", "value", "label", "text"),
    [
        ("loss", 0.68013334, "reconstruction loss", "0.6801"),
        ("val_top1", 96.5, "validation, top-1", "96.5 %"),
        ("val_top5", 100, "validation, top-5", "100 %"),
        ("knn_top1", 33.333, "nearest neighbours, top-1", "33.33 %"),
        ("linear_top1", 5, "linear classifier, top-1", "5 %"),
        ("data_wait", 0.015, "waiting for data", "1.5 %"),
        ("lr", 1.5e-4, "learning rate", "1.5e-4"),
        ("feature_diversity_3", 0.5, "feature diversity, stage 3", "0.5"),
        ("gradient_norm", 1234.5678, "norm of the gradient", "1235"),
        ("memory", 3 * 2**30, "memory", "3072 MiB"),
        ("peak_memory_gib", 1.25, "peak memory", "1.25 GiB"),
        ("probe_seconds", 12, "time of the probes", "12 s"),
        ("some_seconds", 12, "time of some", "12 s"),
        ("memory_mib", 1.25, "peak memory", "1.25 MiB"),
        ("teacher_loss", 2, "teacher loss", "2"),
        ("something_new", -1e9, "something new", "-1e9"),
    ],
)
def test_columns_have_names_and_units(column: str, value: float, label: str, text: str) -> None:
    plot = plot_of(column, [value, 0])
    assert (plot.label, plot.text(plot.points[0][0][1])) == (label, text)
    assert plot.group != "Other" or column == "something_new"


def test_columns_of_a_group_stand_together() -> None:
    row = {"epoch": 1, "step": 5, "x": 1, "val_top1": 2, "seconds": 1, "train_loss": 3, "knn_top1": 1, "val_loss": 3}
    found = plots([Run(Path("a"), "a", rows=[row, {"epoch": 2, "loss": 1}])])
    expected = ["loss", "train_loss", "val_loss", "val_top1", "knn_top1", "seconds", "x"]
    assert [plot.column for plot in found] == expected
    assert not any(plot.changes for plot in found)


def test_a_line_runs_through_its_points() -> None:
    plot = plot_of("loss", [3.0, 2.0, 1.0], [2.0])
    first, second = plot.lines
    places = [tuple(map(float, place.split())) for place in re.split("[ML]", first.path)[1:]]
    assert [x for x, _ in places] == pytest.approx([LEFT, (LEFT + RIGHT) / 2, RIGHT], abs=0.06)
    steps = [b - a for (_, a), (_, b) in itertools.pairwise(places)]
    assert steps[0] == pytest.approx(steps[1], abs=0.11)
    assert TOP < places[0][1] < places[2][1] < BOTTOM
    assert first.marks[1][2] == "a, epoch 2: 2"
    assert (second.run, second.path, len(second.marks)) == (1, f"M{LEFT:.1f} {places[1][1]}", 1)
    assert [text for _, text in plot.x_ticks] == ["1", "2", "3"]
    assert [text for _, text in plot.y_ticks] == ["1", "2", "3"]


def test_missing_numbers_leave_gaps_and_single_points_are_marked() -> None:
    values = [1.0, None, 2.0, math.nan, math.inf, 3.0, 4.0, *[float(place) for place in range(60)]]
    (line,) = plot_of("loss", values).lines
    assert line.path.count("M") == 3
    assert [text for _, _, text in line.marks] == ["a, epoch 1: 1", "a, epoch 3: 2"]
    assert plot_of("loss", values).described.endswith("a: from 1 to 59, between 0 and 59.")


def test_what_is_no_number_is_not_drawn() -> None:
    row = {"epoch": 1, "a": "1", "b": True, "c": [1], "d": None, "e": {"x": 1}, "f": 10**400, "g": 1}
    assert [plot.column for plot in plots([Run(Path("a"), "a", rows=[row])])] == ["g"]


@pytest.mark.parametrize("values", [[1e30, -1e30], [1e-300, 2e-300], [5.0, 5.0], [0, 0], [-1, -1 - 1e-12], [1]])
def test_any_range_has_places_and_ticks(values: list[float]) -> None:
    plot = plot_of("loss", values)
    (line,) = plot.lines
    assert all(math.isfinite(float(part)) for part in re.findall(r"[-\w.]+", re.sub("[ML]", " ", line.path)))
    assert all(LEFT <= float(x) <= RIGHT and TOP <= float(y) <= BOTTOM for x, y, _ in line.marks)
    assert plot.x_ticks
    json.loads(plot.data)


def test_ticks_of_a_narrow_range_tell_apart() -> None:
    texts = [text for _, text in plot_of("feature_diversity", [0.4965, 0.4972]).y_ticks]
    assert len(texts) == len(set(texts)) > 2
    assert all(len(text) <= 7 for text in texts)


def test_long_lines_keep_their_peaks_and_ends() -> None:
    values = [math.sin(place / 50) for place in range(20_000)]
    values[12_345], values[777] = 9.0, -9.0
    plot = plot_of("loss", values)
    (points,) = json.loads(plot.data)["lines"]
    assert len(points) <= MOST_POINTS + 2
    assert {1, 778, 12_346, 20_000} <= {epoch for epoch, _, _ in points}
    assert plot.lines[0].path.count("L") == len(points) - 1
    assert [epoch for epoch, _, _ in points] == sorted({epoch for epoch, _, _ in points})


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "1"), (-0.5, "-0.5"), (0.00123456, "0.001235"), (12345.678, "12346"), (1e6, "1e6"),
     (1.23456e-7, "1.235e-7"), (99.99999, "100"), (1e30, "1e30"), (0.1 + 0.2, "0.3"), (5e-324, "4.941e-324")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert short_names([Path("/x/s/run"), Path("/x/t/run"), Path("/x/c")]) == ["s/run", "t/run", "c"]
    assert short_names([Path("/run"), Path("/x/run")]) == ["//run", "x/run"]
    assert short_names([Path("/x/a\nb")]) == ["a b"]

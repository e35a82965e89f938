"""Tables follow from the numbers that are kept, and those of the documents from files of the project."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

from studies import tables

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "results.md"
FIGURE = re.compile(r"\d+\.\d+|\d+ ?%|\d+ (?:seconds|minutes|points)|±")


def number(arm: str, seed: int, top1: float, labels: float = 1, **changes: Any) -> dict[str, Any]:
    row = {"question": "q", "arm": arm, "seed": seed, "measure": "knn", "labels": labels, "top1": top1}
    return {**row, "seconds": 90.0, "part": f"{arm}{seed}", **changes}


FOUND: dict[str, Any] = {
    "study": "s", "scale": "smoke", "title": "T", "questions": {"q": "Which?", "empty": "None?"}, "missing": 1,
    "measured_on": {"threads": ["1", "2"]},
    "numbers": [number("a", 0, 50.0), number("a", 1, 53.0), number("a", 2, 56.0), number("b", 0, 40.0, 0.05)],
    "curves": [{"question": "q", "arm": "a", "seed": 0, "knn": [[1, 30.0], [2, 40.0]]}],
}  # fmt: skip


def test_mean_deviation_and_error_over_seeds() -> None:
    assert tables.markdown(FOUND, "q").splitlines()[2:] == [
        "| a | 100% | knn | 53.0 | 3.0 | 1.7 | 3 | 90 |",
        "| b | 5% | knn | 40.0 | – | – | 1 | 90 |",
    ]
    text = tables.document(FOUND)
    assert "1 numbers are missing." in text
    assert "threads 1 and 2" in text


@pytest.mark.pictures
def test_plots_are_drawn_of_much_and_of_nothing(tmp_path: Path) -> None:
    drawn = tables.draw(FOUND, tmp_path)
    assert len(drawn) == 6
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_document_is_made_anew_between_its_markers(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(FOUND))
    text = "Before 1.\n\n<!-- study: r.json q -->\nold | 99.9\n<!-- end -->\nafter"
    new = tables.render(text, tmp_path)
    assert "99.9" not in new
    assert "| 53.0 | 3.0 |" in new
    assert new.startswith("Before 1.\n\n<!-- study: r.json q -->\n")
    assert new.endswith("\n<!-- end -->\nafter")
    assert tables.render(new, tmp_path) == new
    for wrong in ("<!-- study: none.json q -->", "<!-- study: r.json other -->"):
        with pytest.raises(ValueError, match="no results of the question"):
            tables.render(f"{wrong}\n<!-- end -->", tmp_path)


def test_differences_are_taken_seed_by_seed() -> None:
    rival = [number("c", 1, 50.0), number("c", 2, 52.0), number("c", 0, 30.0, measure="linear")]
    found = {**FOUND, "numbers": [*FOUND["numbers"], *rival]}
    text = tables.differences(found, "q", "c").splitlines()
    assert text == ["| arm, less c | labels | measure | points | se | seeds |", "|---|---|---|---|---|---|",
                    "| a | 100% | knn | +3.5 | 0.5 | 2 |"]  # fmt: skip
    with pytest.raises(ValueError, match="no arm z"):
        tables.differences(found, "q", "z")


def test_a_document_may_hold_differences(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({**FOUND, "numbers": [number("an arm", 0, 5.0), number("b", 0, 7.0)]}))
    new = tables.render("<!-- study: r.json q against an arm -->\n<!-- end -->", tmp_path)
    assert "| b | 100% | knn | +2.0 | – | 1 |\n<!-- end -->" in new
    assert tables.render(new, tmp_path) == new


def test_diversity_is_the_mean_of_the_seeds_that_told_it(tmp_path: Path) -> None:
    curve = {"question": "q", "arm": "a", "knn": [[1, 5.0]]}
    told = [[0.4, 0.2, 0.1, 0.3], [0.2, 0.2, 0.3, 0.1]]
    curves = [{**curve, "seed": seed, "feature_diversity": values} for seed, values in enumerate(told)]
    found = {**FOUND, "curves": [*curves, {**curve, "seed": 2}, {**curve, "arm": "b", "seed": 0}]}
    text = tables.diversity(found, "q").splitlines()
    assert text == ["| arm | stage 1 | stage 2 | stage 3 | stage 4 | seeds |", "|---|---|---|---|---|---|",
                    "| a | 0.300 | 0.200 | 0.200 | 0.200 | 2 |"]  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps(found))
    assert text[-1] in tables.render("<!-- study: r.json q diversity -->\n<!-- end -->", tmp_path)


def test_curves_are_known_only_of_what_is_known(tmp_path: Path) -> None:
    """Of another scale, whose pre-trainings are others, neither curves nor diversity are taken over."""
    file = tmp_path / "other.json"
    curves = [{"question": "q", "arm": arm, "seed": 0, "knn": [[1, 5.0]]} for arm in ("a", "b")]
    file.write_text(json.dumps({**FOUND, "numbers": [number("a", 0, 50.0), number("b", 0, 5.0)], "curves": curves}))
    cells = [SimpleNamespace(question="q", arm=arm, part=SimpleNamespace(key=key, seed=0))
             for arm, key in (("a", "a0"), ("b", "another"))]  # fmt: skip
    known = tables.known_numbers([file], SimpleNamespace(name="s", cells=cells))  # type: ignore[arg-type]
    assert [row["arm"] for row in known["numbers"]] == ["a"]
    assert known["curves"] == curves[:1]


def test_every_number_of_the_results_is_in_a_file_of_the_project() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert tables.MARKED.search(text)
    assert all(found[2].startswith("studies/results/") for found in tables.MARKED.finditer(text))
    assert tables.render(text, ROOT) == text, "python -m studies table --markdown docs/results.md"
    rest = tables.MARKED.sub("", text)
    assert "<!--" not in rest
    assert not FIGURE.findall(rest), "a figure outside of the tables"


@pytest.mark.parametrize("file", sorted((ROOT / "studies" / "results").glob("*.json")), ids=lambda file: file.stem)
def test_results_are_whole(file: Path) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    assert file.stem == f"{found['study']}-{found['scale']}"
    assert found["missing"] == 0
    assert {"processor", "torch", "threads", "code"} <= found["measured_on"].keys()
    assert all(0 <= one["top1"] <= 100 and one["seconds"] > 0 and one["part"] for one in found["numbers"])


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "studies" / "results" / "flowers-recipes.json").read_text(encoding="utf-8"))
    means = {row[:3]: fmean(row[3]) for row in tables.rows(found, "recipes")}
    gains = tables.differences(found, "recipes", "scratch")
    for share, photographs in ((0.25, 642), (0.1, 258), (0.05, 129)):
        gain = re.search(rf"\| FCMAE \| {100 * share:g}% \| finetune \| (\S+) \| (\S+) \| 3 \|", gains)
        assert gain is not None
        columns = ("scratch", "finetune"), ("FCMAE", "linear"), ("FCMAE", "finetune")
        shown = " | ".join(f"{means[arm, share, measure]:.1f} %" for arm, measure in columns)
        assert f"| {photographs} | {shown} | {gain[1]}, {gain[2]} |" in readme
    found = json.loads((ROOT / "studies" / "results" / "flowers-all.json").read_text(encoding="utf-8"))
    ours, rival = (row[3] for row in tables.rows(found, "all") if row[2] == "finetune")
    assert len(ours) == len(rival) == 1
    assert f"after one of these pre-trainings: {ours[0]:.1f} % against {rival[0]:.1f} % from scratch." in readme
    found = json.loads((ROOT / "studies" / "results" / "flowers-budget.json").read_text(encoding="utf-8"))
    rival, ours = (f"{fmean(row[3]):.1f} %" for row in sorted(tables.rows(found, "budget"), reverse=True))
    assert (
        f"258 labels gave {ours}; from scratch, for as long as pre-training and\nfine-tuning take together, {rival},"
        in readme
    )
    found = json.loads((ROOT / "studies" / "results" / "cifar10-evening.json").read_text(encoding="utf-8"))
    gains = tables.differences(found, "labels", "scratch")
    told = re.findall(r"\| FCMAE \| \S+% \| finetune \| \+(\S+) \| – \| 1 \|", gains)
    assert f"gained {told[0]} points with 1,000 labels and {told[1]} with 400, after one pre-training" in readme

"""What a study came to: its numbers in one JSON file, tables and plots made from that file alone."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from convnextv2.training.pictures import picture
from studies.declaration import Study
from studies.runner import read_json, record_of

MARKED = re.compile(r"(<!-- study: (\S+) (\S+?)(?: (diversity)| against (.+?))? -->\n).*?(<!-- end -->)", re.S)
"""A table in a document: the file that it is made from, the question, and what of it, if not its accuracies: the
features' diversity, or differences to the arm that others are compared with."""
HEAD = "| arm | labels | measure | top-1, % | sd | se | seeds | seconds |"
AGAINST_HEAD = "| arm, less {} | labels | measure | points | se | seeds |"
DURING = ("knn", "feature_diversity")
"""What of a pre-training itself is kept: the looks of kNN, and the last epoch's feature diversity, by stage."""
DIVERSITY_HEAD = "| arm | stage 1 | stage 2 | stage 3 | stage 4 | seeds |"


def known_numbers(paths: Iterable[Path], study: Study) -> dict[str, Any]:
    """What :func:`collect` found elsewhere, at this scale or others, of the parts that the study has.

    ValueError if a file is not of this study, or damaged.
    """
    parts = {cell.part.key for cell in study.cells}
    arms = {(cell.question, cell.arm, cell.part.seed) for cell in study.cells}
    facts: dict[str, set[str]] = {}
    kept: dict[str, list[dict[str, Any]]] = {"numbers": [], "curves": []}
    for path in paths:
        found = _read_numbers(path, study)
        numbers = [row for row in found["numbers"] if row["part"] in parts]
        kept["numbers"] += numbers
        same = arms & {(row["question"], row["arm"], row["seed"]) for row in numbers}
        kept["curves"] += [row for row in found["curves"] if (row["question"], row["arm"], row["seed"]) in same]
        for name, values in found["measured_on"].items() if numbers else ():
            facts.setdefault(name, set()).update(values)
    return {**kept, "measured_on": facts}


def _read_numbers(path: Path, study: Study) -> dict[str, Any]:
    found = read_json(path)
    if found is None or found.get("study") != study.name:
        raise ValueError(f"{path}: holds no numbers of {study.name}")
    needed = {"numbers": {"part", "top1", "seconds", "question", "arm", "seed"}, "curves": {"question", "arm", "seed"}}
    lists = all(
        isinstance(rows := found.get(name), list) and all(isinstance(row, dict) and row.keys() >= keys for row in rows)
        for name, keys in needed.items()
    )
    facts = found.get("measured_on")
    if not lists or not isinstance(facts, dict) or not all(isinstance(values, list) for values in facts.values()):
        raise ValueError(f"{path}: is damaged: its numbers, curves or what they were measured on are not whole")
    return found


def collect(study: Study, folder: Path, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The numbers of all parts that are done, here or in ``known``, the curves, and what they were measured on."""
    known = known or {"numbers": [], "curves": [], "measured_on": {}}
    there = {row["part"]: {name: row[name] for name in ("top1", "seconds", "part")} for row in known["numbers"]}
    curves = {(row["question"], row["arm"], row["seed"]): row for row in known["curves"]}
    facts = {name: set(values) for name, values in known["measured_on"].items()}
    numbers = list[dict[str, Any]]()
    for cell in study.cells:
        record = record_of(cell.part, folder)
        before = record_of(cell.part.needs, folder) if cell.part.needs else None
        row = {"question": cell.question, "arm": cell.arm, "seed": cell.part.seed}
        place = {**row, "measure": cell.measure, "labels": cell.labels}
        if before is not None:
            during = {name: before["result"][name] for name in DURING if name in before["result"]}
            curves[cell.question, cell.arm, cell.part.seed] = {**row, **during}
        if record is None:
            if cell.part.key in there:
                numbers.append({**place, **there[cell.part.key]})
            continue
        seconds = record["seconds"] + (before["seconds"] if before else 0)
        found = {"top1": record["result"]["top1"], "seconds": round(seconds, 1), "part": cell.part.key}
        numbers.append({**place, **found})
        for one in (record, *([before] if before else [])):
            for name, value in {**one["hardware"], **one["versions"], "code": one["code"]}.items():
                facts.setdefault(name, set()).add(str(value))
    return {
        "study": study.name,
        "scale": study.scale,
        "title": study.title,
        "questions": dict(study.questions),
        "missing": len(study.cells) - len(numbers),
        "measured_on": {name: sorted(values) for name, values in sorted(facts.items())},
        "numbers": numbers,
        "curves": list(curves.values()),
    }


def _groups(found: Mapping[str, Any], question: str) -> dict[tuple[str, float, str], list[dict[str, Any]]]:
    """Numbers of a question by arm, share of the labels and measure, in the order of the declaration."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for number in found["numbers"]:
        if number["question"] == question:
            groups.setdefault((number["arm"], number["labels"], number["measure"]), []).append(number)
    return groups


def _heading(head: str) -> list[str]:
    """The first lines of a table."""
    return [head, "|" + "---|" * head.count(" | ") + "---|"]


def rows(found: Mapping[str, Any], question: str) -> Iterator[tuple[str, float, str, list[float], float]]:
    """Arm, share of the labels, measure, accuracies of the seeds, and mean seconds, in the order of the declaration."""
    for (arm, labels, measure), these in _groups(found, question).items():
        yield arm, labels, measure, [one["top1"] for one in these], fmean(one["seconds"] for one in these)


def markdown(found: Mapping[str, Any], question: str) -> str:
    """The table of a question; sd is the sample's standard deviation over seeds, se that of the mean."""
    lines = _heading(HEAD)
    for arm, labels, measure, values, seconds in rows(found, question):
        sd = stdev(values) if len(values) > 1 else None
        spread = f"{sd:.1f} | {sd / len(values) ** 0.5:.1f}" if sd is not None else "– | –"
        cells = (
            f"{arm} | {100 * labels:g}% | {measure} | {fmean(values):.1f} | {spread} | {len(values)} | {seconds:.0f}"
        )
        lines.append(f"| {cells} |")
    return "\n".join(lines)


def differences(found: Mapping[str, Any], question: str, rival: str) -> str:
    """The table of how far each arm is above ``rival``, of the seeds that both have; ValueError if it is no arm."""
    lines, groups = _heading(AGAINST_HEAD.format(rival)), _groups(found, question)
    for (arm, labels, measure), own in groups.items():
        theirs = {one["seed"]: one["top1"] for one in groups.get((rival, labels, measure), ())}
        values = [one["top1"] - theirs[one["seed"]] for one in own if one["seed"] in theirs]
        if arm != rival and values:
            se = f"{stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else "–"
            lines.append(f"| {arm} | {100 * labels:g}% | {measure} | {fmean(values):+.1f} | {se} | {len(values)} |")
    if not any(arm == rival for arm, *_ in groups):
        raise ValueError(f"{question} has no arm {rival}")
    return "\n".join(lines)


def diversity(found: Mapping[str, Any], question: str) -> str:
    """The table of each arm's feature diversity by stage after its pre-training, mean over the seeds that told it."""
    arms: dict[str, list[list[float]]] = {}
    for curve in found["curves"]:
        if curve["question"] == question and "feature_diversity" in curve:
            arms.setdefault(curve["arm"], []).append(curve["feature_diversity"])
    lines = _heading(DIVERSITY_HEAD)
    for arm, seeds in arms.items():
        stages = " | ".join(f"{fmean(stage):.3f}" for stage in zip(*seeds, strict=True))
        lines.append(f"| {arm} | {stages} | {len(seeds)} |")
    return "\n".join(lines)


def document(found: Mapping[str, Any]) -> str:
    """All tables, with their headings and what they were measured on."""
    facts = "; ".join(f"{name} {' and '.join(values)}" for name, values in found["measured_on"].items())
    parts = [f"# {found['title']}, scale {found['scale']}"]
    for question, title in found["questions"].items():
        parts += [f"## {title}", markdown(found, question)]
        if len((told := diversity(found, question)).splitlines()) > 2:
            parts += ["Feature diversity after the pre-training:", told]
    missing = f"\n\n{found['missing']} numbers are missing." if found["missing"] else ""
    return "\n\n".join(parts) + f"\n\nMeasured on: {facts}.{missing}\n"


def render(text: str, root: Path) -> str:
    """A document with the tables between its markers made anew; ValueError if a file that one names is not there."""

    def table(found: re.Match[str]) -> str:
        results = read_json(root / found[2])
        if results is None or found[3] not in results.get("questions", ()):
            raise ValueError(f"{found[2]}: no results of the question {found[3]} there")
        if found[5]:
            made = differences(results, found[3], found[5])
        else:
            made = (diversity if found[4] else markdown)(results, found[3])
        return f"{found[1]}{made}\n{found[6]}"

    return MARKED.sub(table, text)


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Plots of every question, as PNG files in ``folder``: accuracy against labels, against time, and curves."""
    made = list[Path]()
    for question in found["questions"]:
        for name, plot in PLOTS.items():
            path = folder / f"{question}-{name}.png"
            with picture(path, 8, 4.5, "constrained") as figure:
                axes = figure.subplots()
                plot(axes, found, question)
                axes.set(title=textwrap.fill(found["questions"][question], 50), ylabel="top-1, %")
                axes.grid(alpha=0.3)
                if axes.get_legend_handles_labels()[0]:
                    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
            made.append(path)
    return made


def _accuracies(axes: Any, found: Mapping[str, Any], question: str, against: str) -> None:
    """A colour an arm, a mark a measure; ``against`` labels or seconds."""
    lines: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for arm, labels, measure, values, seconds in rows(found, question):
        spread = stdev(values) if len(values) > 1 else 0.0
        x = 100 * labels if against == "labels" else seconds
        lines.setdefault((arm, measure), []).append((x, fmean(values), spread, labels))
    arms = list(dict.fromkeys(arm for arm, _ in lines))
    for (arm, measure), points in lines.items():
        style = {"color": f"C{arms.index(arm)}", "label": f"{arm}, {measure}", **STYLES[measure]}
        xs, means, spreads, shares = zip(*sorted(points), strict=True)
        axes.errorbar(xs, means, spreads, capsize=3, **style)
        if against == "seconds":
            for x, mean, share in zip(xs, means, shares, strict=True):
                axes.annotate(f"{100 * share:g}%", (x, mean), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axes.set_xscale("log")
    if against == "labels":
        ticks = sorted({100 * labels for _, labels, *_ in rows(found, question)})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.minorticks_off()
    axes.set_xlabel(AGAINST[against])


def _probes(axes: Any, found: Mapping[str, Any], question: str) -> None:
    curves: dict[str, dict[int, list[float]]] = {}
    for curve in found["curves"]:
        if curve["question"] == question:
            for epoch, top1 in curve["knn"]:
                curves.setdefault(curve["arm"], {}).setdefault(epoch, []).append(top1)
    for arm, points in curves.items():
        axes.plot(list(points), [fmean(values) for values in points.values()], label=arm, marker="o")
    axes.set(xlabel="epoch of the pre-training (kNN with all labels, mean over seeds)")
    axes.locator_params(axis="x", integer=True)


STYLES = {
    "finetune": {"marker": "o", "linestyle": "-"},
    "linear": {"marker": "s", "linestyle": "--"},
    "knn": {"marker": "^", "linestyle": ":"},
}
AGAINST = {"labels": "labels, % of the training images", "seconds": "seconds of training, pre-training included"}
PLOTS: Mapping[str, Callable[[Any, Mapping[str, Any], str], None]] = {
    "labels": partial(_accuracies, against="labels"),
    "time": partial(_accuracies, against="seconds"),
    "probes": _probes,
}


def copy_reconstructions(study: Study, folder: Path, target: Path) -> None:
    """The pictures of the first seed of every arm that pre-trains, first to last epoch."""
    for cell in reversed(study.cells):  # the first seed comes last, and stays
        if cell.part.needs is not None:
            for source in sorted(cell.part.needs.run(folder).glob("reconstructions/epoch_*.png")):
                place = target / f"{cell.question}-{re.sub(r'[^0-9A-Za-z]+', '-', cell.arm)}"
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place / source.name)

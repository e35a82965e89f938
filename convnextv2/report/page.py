"""The page: one file of HTML that fetches nothing, for a browser with or without scripts."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from convnextv2 import __version__
from convnextv2.data.names import shown
from convnextv2.messages import one_line
from convnextv2.outputs import Kind
from convnextv2.report.curves import Plot, plots, short
from convnextv2.report.pictures import COLUMNS, pictures
from convnextv2.report.runs import TIES, Run, best_epoch, is_numeric, number, read_run, short_names

START = "<!doctype html>\n<!-- convnextv2 report of runs -->\n"
COLOURS, DASHES = 8, 4
"""Of lines: runs beyond those share them, in other pairs."""
MOST_PLOTS = MOST_COLUMNS = 60
MOST_ROWS = 60
"""Epochs in a table of numbers: taken evenly, the first and the last among them."""
LONGEST = 300
"""Letters of a value in a table."""
PLACES = ("data", "output", "init")
ABSENT = "–"


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(START)) == START.encode()


REPORT = Kind("a report", (".html", ".htm"), _is_report)


@dataclass(frozen=True)
class Cell:
    """A value in a table, and whether it is not the usual one."""

    text: str
    unusual: bool = False


Lines = list[tuple[str, list[Cell]]]
"""Of a table of runs: a name, and a cell for each run."""


@dataclass(frozen=True)
class Comparison:
    """Two tables of runs."""

    differing: Lines
    others: Lines


def report(paths: Sequence[Path]) -> tuple[str, list[str]]:
    """The page about the runs in these folders, and all its notices, which it holds as well.

    Raises OSError if a folder cannot be looked at; what is missing or damaged in one is a notice.
    """
    runs = [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]
    found = pictures(runs)
    drawn = plots(runs)
    changing = [plot for plot in drawn if plot.changes]
    page = _environment().get_template("page.html")
    style, script = _part("style.css"), _part("script.js")
    text = page.render(
        absent=ABSENT,
        columns=COLUMNS,
        commands=any(run.sessions or run.again for run in runs),
        environments=environments(runs),
        made=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        numbers=[numbers(run) for run in runs],
        more=len(changing[MOST_PLOTS:]),
        plots=changing[:MOST_PLOTS],
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        recipes=recipes(runs),
        runs=[
            {"run": run, "pictures": own, "facts": facts(run), "look": place % COLOURS, "dash": dash(place)}
            for place, (run, own) in enumerate(zip(runs, found, strict=True))
        ],
        script=script,
        shown=shown,
        start=START,
        style=style,
        unchanging=[f"{plot.label} {_constant(plot)}" for plot in drawn if not plot.changes][:MOST_PLOTS],
        version=__version__,
        wrapped=wrapped,
    )
    return text, [f"{run.name}: {notice}" for run in runs for notice in run.notices]


def dash(place: int) -> int:
    """Which pattern the lines of a run have: each colour has another one the next time."""
    return (place + place // COLOURS) % DASHES


def facts(run: Run) -> list[tuple[str, str]]:
    """The run in a few lines: what and how well."""
    planned = f" of {run.planned}" if run.planned is not None and run.planned != run.epochs else ""
    told = [("epochs", f"{run.epochs}{planned}")]
    for column, name in (("loss", "loss"), ("train_loss", "training loss"), ("val_loss", "validation loss")):
        values = [value for _, value in run.values(column) if value is not None]
        if values:
            told.append((name, short(values[-1]) if len(values) == 1 else f"{short(values[0])} → {short(values[-1])}"))
    for column, name in (
        ("val_top1", "best top-1"),
        ("val_miou", "best mIoU"),
        ("knn_top1", "neighbours, top-1"),
        ("linear_top1", "linear, top-1"),
    ):
        scores = {epoch: value for epoch, value in run.values(column) if value is not None}
        epoch = best_epoch(run, column) if column in TIES else max(scores, default=None)
        if epoch is not None:
            told.append((name, f"{scores[epoch]:.2f} % (epoch {epoch})"))
    if (diversity := run.last("feature_diversity")) is not None:
        told.append(("feature diversity", short(diversity)))
    seconds = sum(value for _, value in run.values("seconds") if value is not None)
    if seconds > 0:
        told.append(("training time", duration(seconds)))
    weights = [run.path / "checkpoints" / f"{name}.safetensors" for name in ("best", "last")]
    told += [("weights", f"{file.name}, {file.stat().st_size / 1e6:.1f} MB") for file in weights if file.is_file()]
    if run.classes:
        told.append(("classes", str(len(run.classes))))
    return told


def duration(seconds: float) -> str:
    """In the two largest units."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.0f} s"


def recipes(runs: Sequence[Run]) -> Comparison:
    """Options of the runs: those that differ, between runs or, of a single one, from the defaults; and the others.

    An option that only some runs can have differs where one of them has an unusual value.
    """
    differing: Lines = []
    others: Lines = []
    for key in dict.fromkeys(key for run in runs for key in run.recipe):
        given = [run.recipe[key] for run in runs if key in run.recipe]
        cells = [
            Cell(text(run.recipe[key]), run.usual.get(key, run) != run.recipe[key] and bool(run.usual))
            if key in run.recipe
            else Cell(ABSENT)
            for run in runs
        ]
        unusual = any(cell.unusual for cell in cells)
        partly = len(given) < sum(bool(run.recipe) for run in runs)
        differs = unusual if len(runs) == 1 or partly else any(value != given[0] for value in given)
        (differing if differs else others).append((text(key), cells))
    for lines in (differing, others):
        lines.sort(key=lambda line: line[0] in PLACES)
    return Comparison(differing, others)


def environments(runs: Sequence[Run]) -> Comparison:
    """Of the last session of each run: what differs between runs, and the rest; the command is not part of it."""
    flat = [_flat(run.sessions[-1]) if run.sessions else {} for run in runs]
    differing: Lines = []
    others: Lines = []
    for key in dict.fromkeys(key for values in flat for key in values):
        cells = [Cell(values.get(key, ABSENT)) for values in flat]
        known = {values[key] for values in flat if key in values}
        (differing if len(known) > 1 else others).append((key, cells))
    return Comparison(differing, others)


def numbers(run: Run) -> dict[str, Any]:
    """Rows of the metrics as a table: ``names``, ``rows`` of text, and how many epochs there are in ``all``."""
    names = list(dict.fromkeys(name for row in run.rows for name in row if is_numeric(row[name])))
    names, rows = names[:MOST_COLUMNS], run.rows
    if len(rows) > MOST_ROWS:
        rows = [rows[round(place * (len(rows) - 1) / (MOST_ROWS - 1))] for place in range(MOST_ROWS)]
    cells = [[_number(row.get(name, "")) for name in names] for row in rows]
    return {"names": [text(name) for name in names], "rows": cells, "all": len(run.rows)}


def text(value: Any) -> str:
    """A value of a recipe or an environment, as it is written there, in one line."""
    if isinstance(value, list):
        told = " ".join(text(item) for item in value[:100])
    elif value is None or isinstance(value, bool):
        told = {None: "none", True: "true", False: "false"}[value]
    else:
        told = str(value)
    told = one_line(told)
    return told if len(told) <= LONGEST else f"{told[:LONGEST]}…"


def wrapped(command: str) -> str:
    """A command with each option in a line of its own, which a shell reads as the same."""
    try:
        words = shlex.split(command)
    except ValueError:  # no command of ours
        return command
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(line) for line in lines)


def _number(value: Any) -> str:
    if not is_numeric(value):
        return ABSENT
    drawn = number(value)
    return "null" if drawn is None else short(drawn)


def _constant(plot: Plot) -> str:
    return next(plot.text(value) for points in plot.points for _, value in points if value is not None)


def _flat(session: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in session.items():
        if isinstance(value, dict):
            found |= {text(name): text(inner) for name, inner in value.items() if not isinstance(inner, dict | list)}
        elif key not in ("command", "after_step") and not isinstance(value, list):
            found[text(key).replace("_", " ")] = text(value)
    return found


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("convnextv2.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _part(name: str) -> str:
    """The style or the script, which are ours and stand in the page as they are."""
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    """By which the page's policy knows a part: no other style and no other script has an effect."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"

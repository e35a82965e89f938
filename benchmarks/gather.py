"""Turns JSON files of the benchmarks into one Markdown file, and one JSON file that holds them all.

python benchmarks/gather.py reports/*.json --markdown results.md --json results.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEFT_OUT = ("times_ms", "times_us")
NUMBERS: dict[str, Callable[[float], str]] = {
    "error": "{:.1e}".format,
    "output_error": "{:.1e}".format,
    "gradient_error": "{:.1e}".format,
    "flop_utilisation": "{:.1%}".format,
    "of_floor": "{:.0%}".format,
    "speedup": "{:.2f}×".format,
    "speedup_min": "{:.2f}×".format,
    "speedup_max": "{:.2f}×".format,
    "against_dense": "{:.2f}×".format,
    "ms_per_image": "{:.3f}".format,
    "ms_per_image_min": "{:.3f}".format,
    "ms_per_image_max": "{:.3f}".format,
}
"""How a column's numbers are written; others have two decimals."""


def cell(column: str, value: Any) -> str:
    """A value of a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return NUMBERS.get(column, "{:.2f}".format)(value)
    if isinstance(value, list):
        return ("×" if column in ("img_size", "grid_size", "dims") else ", ").join(map(str, value))
    return str(value)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of one benchmark; columns without any value are left out."""
    columns = [c for c in rows[0] if c not in LEFT_OUT and any(row.get(c) is not None for row in rows)]
    lines = [columns, ["---"] * len(columns), *([cell(c, row.get(c)) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_text(path: Path, text: str) -> None:
    """Atomically: whoever is killed meanwhile leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def section(title: str, report: dict[str, Any]) -> str:
    """One benchmark: what it ran on, its options, its table."""
    facts = ", ".join(f"{k} {cell(k, v)}" for k, v in report["hardware"].items())
    options = ", ".join(f"{k} {cell(k, v)}" for k, v in report["options"].items() if v not in (None, False))
    found = table(report["results"]) if report["results"] else "Nothing was measured."
    return f"## {title}\n{facts}\n\nOptions: {options}\n\n{found}\n"


def write(reports: dict[str, dict[str, Any]], title: str, notes: list[str], markdown: Path, into: Path) -> None:
    """Both files: ``notes`` are lines below the title, then a section for each of ``reports``.

    Raises:
        KeyError: if one is not a benchmark's report.
        OSError: if a file cannot be written.
    """
    sections = [section(name, found) for name, found in reports.items()]
    write_text(markdown, "\n".join([f"# {title}\n", *(f"{n}\n" for n in notes), *sections]))
    write_text(into, json.dumps({"notes": notes, "reports": reports}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Write the two files; 2 if a report cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, help="JSON files of the benchmarks")
    parser.add_argument("--title", default="Benchmarks")
    parser.add_argument("--note", action="append", default=[], help="a line below the title; may be repeated")
    parser.add_argument("--markdown", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        reports = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in args.reports}
        write(reports, args.title, args.note, args.markdown, args.json)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: not a benchmark's report: {error!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

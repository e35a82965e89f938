"""What the site has beyond the documents: pages from elsewhere in the repository, tables of benchmarks, help.

Documents link to files as they lie in the repository. Here a link to one outside of ``docs/`` leads to a page made of
it, or to a copy. ``<!-- benchmark: FILE COLUMN… -->`` becomes a table of a file of ``benchmarks/results``,
``<!-- help: of every command -->`` what ``fcmae NAME --help`` says of each, and ``<!-- not run: REASON -->`` before a
block of commands a visible line.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from convnextv2.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Of documents outside of ``docs/``, their places on the site."""
README = "README.md"
"""Whose place the first page takes."""
FENCE = re.compile(r"^(?:```.*?^```$|~~~.*?^~~~$)", re.M | re.S)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
MARKER = re.compile(r"^<!-- (benchmark|help|not run): (.*?) -->$", re.M)
ADDRESS = re.compile(r"[a-z]+:|#")
COMMAND = re.compile(r"^(?:\$ )?(?:fcmae|python|make|torchrun|accelerate|pip|conda|docker|git|scripts/\S+)\b", re.M)
RUN = {"index.md"}
"""Pages, beside the tutorials, whose commands are run by the tests or marked one by one."""
CHECKED = "The tests check that the commands of this page and their options exist; they do not run them.\n{ .untested }"
FEW = 4
"""Significant digits of numbers in tables."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Documents and files outside of ``docs/`` that a document links to become part of the site."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()] + [*PAGES]
    seen = set(waiting)
    while waiting:
        origin = waiting.pop()
        for target in targets(origin):
            if target not in seen and not target.startswith("docs/") and target not in (*PAGES, README):
                seen.add(target)
                if target.endswith(".md"):
                    waiting.append(target)
    for origin in sorted(seen):
        if not origin.startswith("docs/"):
            text = (ROOT / origin).read_bytes()
            files.append(File.generated(config, place(origin), content=text))
    return files


def targets(origin: str) -> Iterator[str]:
    """Files of the repository that a document links to, by their paths in it."""
    text = FENCE.sub("", (ROOT / origin).read_text(encoding="utf-8"))
    for _, link, _ in LINK.findall(text):
        if not ADDRESS.match(link):
            yield resolved(origin, link.partition("#")[0])


def resolved(origin: str, link: str) -> str:
    """A relative link of a document as a path in the repository."""
    path = os.path.normpath(PurePosixPath(origin).parent / link)
    if path.startswith("..") or not (ROOT / path).is_file():
        raise PluginError(f"{origin}: the link {link} leads nowhere")
    return PurePosixPath(path).as_posix()


def place(origin: str) -> str:
    """Where a file of the repository is on the site."""
    if origin == README:
        return "index.md"
    return PAGES.get(origin) or (origin.removeprefix("docs/") if origin.startswith("docs/") else f"files/{origin}")


def origin_of(page: Page) -> str:
    """The document of a page, by its path in the repository."""
    uri = page.file.src_uri
    for origin, name in PAGES.items():
        if name == uri:
            return origin
    return uri.removeprefix("files/") if uri.startswith("files/") else f"docs/{uri}"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links lead to places on the site, markers become what they stand for."""
    origin = origin_of(page)

    def relinked(found: re.Match[str]) -> str:
        before, link, after = found.groups()
        if ADDRESS.match(link):
            return found[0]
        path, hash_, anchor = link.partition("#")
        there = place(resolved(origin, path))
        return before + os.path.relpath(there, PurePosixPath(page.file.src_uri).parent) + hash_ + anchor + after

    uri = page.file.src_uri
    if any(COMMAND.search(block) for block in FENCE.findall(markdown)) and not (uri in RUN or "tutorials/" in uri):
        title, _, rest = markdown.lstrip().partition("\n")
        markdown = f"{title}\n\n{CHECKED}\n\n{rest}"
    made = outside_of_code(markdown, lambda text: LINK.sub(relinked, text))
    return outside_of_code(made, lambda text: MARKER.sub(lambda found: MADE[found[1]](found[2]), text))


def outside_of_code(markdown: str, change: Callable[[str], str]) -> str:
    """The text with ``change`` applied to all but blocks of code."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def not_run(reason: str) -> str:
    """A line that says why the tests do not run the commands below it."""
    return f"Not run by the tests: {reason}.\n{{ .untested }}\n"


def usages(_: str) -> str:
    """What each command says of itself, under a heading of its own."""
    return "\n\n".join(f"### fcmae {name}\n{usage(name)}" for name in COMMANDS)


def usage(name: str) -> str:
    """What a command says of itself."""
    command = [sys.executable, "-m", "convnextv2", *name.split(), "--help"]
    environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise PluginError(f"fcmae {name} --help: {done.stderr}")
    return f"```text\n{done.stdout.rstrip()}\n```"


def benchmark(arguments: str) -> str:
    """A table of a file of ``benchmarks/results``, with what it was measured on.

    Arguments are the file's name, where it holds several reports ``/`` and the name of one, then columns: ``key`` or
    ``key=heading``.
    """
    name, *columns = arguments.split()
    file, _, part = name.partition("/")
    path = ROOT / "benchmarks" / "results" / file
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if part:
        report = report["reports"][part]
    keys, headings = zip(*((column.partition("=")[0], column.rpartition("=")[2]) for column in columns), strict=True)
    lines = [f"| {' | '.join(heading.replace('_', ' ') for heading in headings)} |", "|" + "---|" * len(keys)]
    rows = [[value_of(row, key) for key in keys] for row in report["results"]]
    lines += [f"| {' | '.join(map(cell, row))} |" for row in rows if any(value is not None for value in row)]
    return "\n".join([*lines, "", f"{measured_on(report)} `benchmarks/results/{file}`", "{ .untested }"])


def value_of(row: dict[str, Any], key: str) -> Any:
    """A value of a row; ``a.b`` is that of ``b`` in ``a``."""
    value: Any = row
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{FEW}g}" if value == 0 or 1e-3 <= abs(value) < 10**FEW else f"{value:.2e}"
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return str(value).removeprefix("convnextv2_")


def measured_on(report: dict[str, Any]) -> str:
    """Processor and versions of a report, in words."""
    known = dict(report["hardware"])
    processor, cores = known.pop("processor"), known.pop("cores")
    left_out = {"system", "device"}
    rest = ", ".join(f"{key} {value}" for key, value in known.items() if key not in left_out and value is not None)
    return f"{processor}, {cores} cores; {rest}."


MADE = {"benchmark": benchmark, "help": usages, "not run": not_run}

"""The documents keep their word: commands parse, links lead somewhere, what is named exists, examples run."""

import contextlib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

import convnextv2
from convnextv2.models.fcmae import create_fcmae
from convnextv2.weights import zoo
from sparse_ops import registry

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:python|accelerate launch|torchrun)\b.*?\b((?:scripts|benchmarks)/\w+\.py)(.*)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(script, arguments) of every command in code blocks and inline code."""
    blocks = [block.replace("\\\n", " ") for _, block in FENCE.findall(text)]
    lines = [line for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    for candidate in [*lines, *(" ".join(code.split()) for code in inline)]:
        found = COMMAND.search(candidate)
        if found:
            yield found[1], shlex.split(found[2], comments=True)


COMMANDS = [
    pytest.param(script, arguments, id=f"{document.stem}: {' '.join([script, *arguments])[:80]}")
    for document in DOCUMENTS
    for script, arguments in commands(text_of(document))
]


@cache
def option_names(script: str) -> frozenset[str]:
    """Long options of a script, from its ``--help``."""
    path = ROOT / script
    sys.path.insert(0, str(path.parent))
    argv, sys.argv = sys.argv, [path.name, "--help"]
    try:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
            importlib.import_module(path.stem).main()
    finally:
        sys.argv = argv
        sys.path.remove(str(path.parent))
    assert stop.value.code == 0
    return frozenset(re.findall(r"--[a-z][\w-]*", printed.getvalue()))


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_commands_use_options_that_exist(script: str, arguments: list[str]) -> None:
    assert (ROOT / script).is_file()
    used = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    assert used <= option_names(script), f"unknown: {', '.join(sorted(used - option_names(script)))}"


def test_the_main_path_is_in_the_readme() -> None:
    scripts = [script for script, _ in commands(text_of(ROOT / "README.md"))]
    path = ["pretrain", "visualize", "convert_sparse_to_dense", "finetune", "predict"]
    assert [script for script in scripts if Path(script).stem in path] == [f"scripts/{name}.py" for name in path]


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_recipes_exist(document: Path) -> None:
    missing = {name for name in re.findall(r"configs/\w+\.yaml", text_of(document)) if not (ROOT / name).is_file()}
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_tests_that_are_named_exist(document: Path) -> None:
    for file, test in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", text_of(document)):
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in text_of(ROOT / file), f"{file}::{test}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.M))
    used = re.findall(r"(?:^|`)make ([a-z]+)", text_of(document), re.M)
    assert set(used) <= targets


def anchors(document: Path) -> set[str]:
    """Headings as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(document)), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(document))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)\s]+)\)", text_of(ROOT / "README.md")))
    pages = {relative(page) for page in DOCUMENTS} - {"README.md"}
    assert pages | {"LICENSE", "CITATION.cff"} <= linked


def python_blocks(document: Path) -> list[str]:
    return [block for language, block in FENCE.findall(text_of(document)) if language == "python"]


def test_python_example_of_the_readme_runs() -> None:
    (example,) = python_blocks(ROOT / "README.md")
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    shapes = {name: tuple(names[name].shape) for name in ("loss", "pred", "mask", "logits")}  # type: ignore[attr-defined]
    assert shapes == {"loss": (), "pred": (2, 3072, 6, 7), "mask": (2, 42), "logits": (2, 10)}


@pytest.mark.skipif(
    registry()["cpu"].unavailable_reason() is not None, reason=str(registry()["cpu"].unavailable_reason())
)
@pytest.mark.parametrize("page", ["numerics", "backends"])
def test_python_examples_of_the_kernels_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = python_blocks(ROOT / "docs" / f"{page}.md")[-1]
    exec(compile(example, page, "exec"), {})
    printed = re.findall(r"\d\.\d+e-\d+", capsys.readouterr().out)
    assert len(printed) == {"numerics": 3, "backends": 1}[page]
    assert max(map(float, printed)) < 1.2e-6


@pytest.mark.slow
def test_python_example_of_the_runs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example, evaluation = python_blocks(ROOT / "docs" / "python.md")
    exec(compile(example, "python.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    pace = ["lr", "seconds", "images_per_s", "data_wait"]
    assert printed[0].split() == ["epoch", "step", "loss", *pace, "feature_diversity"]
    assert [line.split()[:2] for line in printed[1:3]] == [["1", "11"], ["2", "22"]]
    assert printed[3].endswith(" %, 359 images")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["finetune", "pretrain", "probe"]
    exec(compile(evaluation, "python.md", "exec"), {})
    lines = re.findall(r"^(\w+): top-1 [\d.]+ %, macro F1 [\d.]+ %, 359 images$", capsys.readouterr().out, re.M)
    assert lines == ["neighbours", "linear"] * 2


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_python_examples_name_what_exists(document: Path) -> None:
    for block in python_blocks(document):
        compile(block, relative(document), "exec")
        for module, names in re.findall(r"^from ([\w.]+) import (.+)$", block, re.M):
            for name in names.split(","):
                assert hasattr(importlib.import_module(module), name.strip()), f"{module}.{name.strip()}"


@pytest.mark.parametrize("name", sorted({file.variant for file in zoo.PUBLISHED.values()}))
def test_variants_table(name: str) -> None:
    with torch.device("meta"):
        models = convnextv2.create_model(name), create_fcmae(name)
    depths, dims = convnextv2.VARIANTS[name]
    counts = [f"{sum(p.numel() for p in model.parameters()):,}" for model in models]
    row = [f"`{name}`", ", ".join(map(str, depths)), ", ".join(map(str, dims)), *counts]
    assert f"| {' | '.join(row)} |" in text_of(ROOT / "README.md")


def test_versions_agree() -> None:
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    newest = re.search(r"^## (\S+)", text_of(ROOT / "CHANGELOG.md"), re.M)
    assert newest is not None
    assert citation["version"] == newest[1] == convnextv2.__version__
    assert [reference["identifiers"][0]["value"] for reference in citation["references"]] == ["arXiv:2301.00808"]

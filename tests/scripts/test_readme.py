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
from typing import Any

import pytest
import torch
import yaml

import convnextv2
from convnextv2.commands import COMMANDS as ALL
from convnextv2.commands import load
from convnextv2.models.fcmae import create_fcmae
from convnextv2.recipes import find_recipe, recipes
from convnextv2.weights import zoo
from sparse_ops import registry

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
COMMAND = re.compile(
    r"(?:python|accelerate launch|torchrun)\b.*?\b((?:scripts|benchmarks)/\w+\.py)(.*)"
    r"|(?:^(?:\$ )?fcmae|-m convnextv2) ([a-z][a-z-]*)((?: .*)?)$"
)
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
            yield found[1] or found[3], shlex.split(found[2] or found[4] or "", comments=True)


COMMANDS = [
    pytest.param(script, arguments, id=f"{document.stem}: {' '.join([script, *arguments])[:80]}")
    for document in DOCUMENTS
    for script, arguments in commands(text_of(document))
]


@cache
def option_names(script: str, command: str = "") -> frozenset[str]:
    """Long options of a command or script, or of one of its commands, from its ``--help``."""
    path = ROOT / script
    folders, argv = sys.path, sys.argv
    sys.path, sys.argv = [str(path.parent), *folders], [path.name, *command.split(), "--help"]
    try:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
            (importlib.import_module(path.stem).main if path.suffix else load(script))()
    finally:
        sys.path, sys.argv = folders, argv
    assert stop.value.code == 0
    return frozenset(re.findall(r"--[a-z][\w-]*", printed.getvalue()))


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_commands_use_options_that_exist(script: str, arguments: list[str]) -> None:
    assert script in ALL if "/" not in script else (ROOT / script).is_file()
    used = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    known = option_names(script, arguments[0] if Path(script).stem == "segment" and arguments else "")
    assert used <= known, f"unknown: {', '.join(sorted(used - known))}"


def test_the_main_path_is_in_the_readme() -> None:
    scripts = [script for script, _ in commands(text_of(ROOT / "README.md"))]
    path = ["pretrain", "visualize", "convert", "finetune", "predict"]
    assert [script for script in scripts if script in path] == path


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_recipes_exist(document: Path) -> None:
    named = re.findall(
        r"configs/(\w+)\.yaml|`((?:pretrain|finetune|segment|digits)_[a-z0-9_]+)\.yaml`", text_of(document)
    )
    assert {name for names in named for name in names if name} <= recipes().keys()
    for task, arguments in commands(text_of(document)):
        if "--config" in arguments and task in ALL:
            first = arguments[arguments.index("--config") + 1]
            assert first.isupper() or first == "mine.yaml" or find_recipe(first, task).is_file(), first


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


def places(entries: list[object]) -> Iterator[str]:
    """Pages of the site's navigation."""
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from places(value) if isinstance(value, list) else [str(value)]


def test_every_page_has_a_place_in_the_navigation() -> None:
    text = text_of(ROOT / "mkdocs.yml")
    navigation = list(places(yaml.safe_load(text[text.index("\nnav:") :])["nav"]))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(navigation) == sorted(pages | {"contributing.md", "changelog.md"})
    linked = set(re.findall(r"\]\(([^)\s]+)\)", text_of(ROOT / "README.md")))
    assert {"LICENSE", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", "docs/limits.md"} <= linked


def python_blocks(document: Path) -> list[str]:
    return [block for language, block in FENCE.findall(text_of(document)) if language == "python"]


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/python.md"])
def test_python_examples_of_the_networks_run(page: str) -> None:
    size = (224, 224) if page == "docs/index.md" else (192, 224)
    names: dict[str, Any] = {"images": torch.randn(2, 3, *size)}
    exec(compile(python_blocks(ROOT / page)[0], page, "exec"), names)
    assert names["loss"].isfinite() and names["fcmae"].encoder.downsample_layers[0][0].weight.grad is not None
    assert names["mask"].shape == (2, size[0] * size[1] // 32**2)
    if page == "docs/python.md":
        assert [tuple(names[name].shape) for name in ("loss", "pred", "logits")] == [(), (2, 3072, 6, 7), (2, 10)]


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
    _, example, evaluation = python_blocks(ROOT / "docs" / "python.md")
    exec(compile(example, "python.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    pace = ["lr", "gradient_norm", "seconds", "images_per_s", "data_wait"]
    diversity = ["feature_diversity", *(f"feature_diversity_{number}" for number in (1, 2, 3, 4))]
    columns = ["epoch", "step", "loss", *diversity, "weight_norm", "memory_mib", *pace]
    assert printed[0].split()[: len(columns)] == columns
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
    assert f"| {' | '.join(row)} |" in text_of(ROOT / "docs" / "models.md")


def test_versions_agree() -> None:
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    newest = re.search(r"^## (\S+)", text_of(ROOT / "CHANGELOG.md"), re.M)
    assert newest is not None
    assert citation["version"] == newest[1]
    assert [reference["identifiers"][0]["value"] for reference in citation["references"]] == ["arXiv:2301.00808"]

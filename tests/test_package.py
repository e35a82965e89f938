"""What is built: the wheel, files that go in, versions, what package indexes show, images; targets, hooks."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml
from packaging.version import Version
from setuptools.dist import Distribution

import convnextv2

ROOT = Path(__file__).parents[1]
ADDRESS = "https://git.example.org/group/project"


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture
def setup_functions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of setup.py."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


def test_a_wheel_serves_every_python_of_its_platform(setup_arguments: dict[str, Any]) -> None:
    wheel = Distribution(setup_arguments).get_command_obj("bdist_wheel")
    wheel.ensure_finalized()
    python, abi, platform = wheel.get_tag()  # type: ignore[attr-defined]
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    assert platform.startswith(sys.platform.rstrip("0123456789") if sys.platform != "darwin" else "macosx")


def test_every_file_of_the_packages_goes_in(setup_arguments: dict[str, Any]) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "convnextv2", "sparse_ops"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    files = [Path(name) for name in listed if name and (ROOT / name).exists()]
    assert len(files) > 100
    for file in files:
        package = ".".join(file.parent.parts)
        if file.suffix == ".py":
            assert package in setup_arguments["packages"], file
        else:
            patterns = [
                f"{owner.replace('.', '/')}/{pattern}"
                for owner, patterns in setup_arguments["package_data"].items()
                for pattern in patterns
            ]
            assert any(fnmatch(file.as_posix(), pattern) for pattern in patterns), file


def setup_py(folder: Path, *arguments: str) -> str:
    """What ``python setup.py`` prints last, in a copy of the sources, with git's files where there are some."""
    done = subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, check=True)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The files that git knows, in a folder without git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def test_versions_are_those_of_tags(sources: Path) -> None:
    assert setup_py(sources, "--version") == "0.0"  # neither git nor an archive of it
    git(sources, "init", "--quiet")
    git(sources, "add", "--all")
    git(sources, "commit", "--quiet", "--message", "first")
    git(sources, "tag", "results-2026")
    untagged = Version(setup_py(sources, "--version"))
    assert untagged.is_devrelease
    assert untagged < Version("0.1.0")
    git(sources, "tag", "v0.3.0")
    assert setup_py(sources, "--version") == "0.3.0"
    git(sources, "commit", "--quiet", "--allow-empty", "--message", "second")
    git(sources, "tag", "results-2027")
    assert setup_py(sources, "--version").startswith("0.3.1.dev1+g")


def test_archives_of_a_tag_know_their_version(sources: Path) -> None:
    """What a forge offers for download: git writes the tag into .git_archival.txt."""
    assert re.search(r"^\.git_archival\.txt +export-subst$", text_of(".gitattributes"), re.M)
    (sources / ".git_archival.txt").write_text(
        f"node: {'0' * 40}\nnode-date: 2027-01-01T00:00:00+00:00\ndescribe-name: v0.3.0\n", encoding="utf-8"
    )
    assert setup_py(sources, "--version") == "0.3.0"


def test_an_sdist_holds_all_and_keeps_its_version(sources: Path) -> None:
    files = {path.relative_to(sources).as_posix() for path in sources.rglob("*") if path.is_file()}
    for stray in ("tests/fuzz/found/crash.bin", "sparse_ops/backends/cpu/_cpu.so"):
        (sources / stray).parent.mkdir(exist_ok=True)
        (sources / stray).write_bytes(b"")
    git(sources, "init", "--quiet")
    git(sources, "add", "--all")
    git(sources, "commit", "--quiet", "--message", "first")
    git(sources, "tag", "v0.3.0")
    setup_py(sources, "--quiet", "sdist")
    (archive,) = (sources / "dist").iterdir()
    assert archive.name == "sparse_fcmae-0.3.0.tar.gz"
    with tarfile.open(archive) as opened:
        opened.extractall(sources / "unpacked", filter="data")
    unpacked = sources / "unpacked" / "sparse_fcmae-0.3.0"
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in found - files - made if not name.startswith("sparse_fcmae.egg-info/")} == set()
    assert {name for name in files - found if not name.startswith(".")} == set()
    assert setup_py(unpacked, "--version") == "0.3.0"


def test_the_version_is_that_of_the_installation(tmp_path: Path) -> None:
    code = "import runpy; print(runpy.run_path('version.py')['__version__'])"
    for name in ("0.3.0", None):
        folder = tmp_path / str(name)
        folder.mkdir()
        shutil.copyfile(ROOT / "convnextv2/version.py", folder / "version.py")
        if name is not None:
            information = folder / "sparse_fcmae-0.3.0.dist-info"
            information.mkdir()
            (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sparse-fcmae\nVersion: {name}\n")
        command, environment = [sys.executable, "-S", "-c", code], {"PYTHONPATH": str(folder)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == (name or "0+unknown")
    assert isinstance(Version(convnextv2.__version__), Version)


README = """# Title
![shapes](docs/images/a.png) of [pages](docs/a.md#part), [files](LICENSE), [here](#title), [the paper](https://arxiv.org/x).

```python
table = names["a"](path)  # [text](docs/a.md)
```
"""


def test_indexes_show_absolute_links(setup_functions: dict[str, Any]) -> None:
    shown = setup_functions["long_description"](README, ADDRESS)
    assert f"![shapes]({ADDRESS}/raw/HEAD/docs/images/a.png) of [pages]({ADDRESS}/blob/HEAD/docs/a.md#part)" in shown
    assert f"[files]({ADDRESS}/blob/HEAD/LICENSE), [here]({ADDRESS}#title), [the paper](https://arxiv.org/x)." in shown
    assert shown.partition("```")[2] == README.partition("```")[2]


def test_indexes_show_no_links_that_lead_nowhere(setup_functions: dict[str, Any]) -> None:
    """There are no files beside the description: without the project's address only what is absolute stays a link."""
    shown = setup_functions["long_description"](README, None)
    assert shown.splitlines()[1] == " of pages, files, here, [the paper](https://arxiv.org/x)."
    assert shown.partition("```")[2] == README.partition("```")[2]


@pytest.mark.parametrize("address", [ADDRESS, None])
def test_the_readme_has_no_relative_links_on_an_index(setup_functions: dict[str, Any], address: str | None) -> None:
    shown = setup_functions["long_description"](text_of("README.md"), address)
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", shown, flags=re.M | re.S))
    assert [link for link in links if not link.startswith("https://")] == []
    assert (len(links) > 30) == (address is not None)
    assert "CC-BY-NC 4.0" in shown.splitlines()[-1]


def test_the_address_is_that_of_the_citation(
    setup_functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(setup_functions["repository"].__globals__, "ROOT", tmp_path)
    citation = tmp_path / "CITATION.cff"
    for line, expected in (
        (f"repository-code: {ADDRESS}/\n", ADDRESS),
        (f'repository-code: "{ADDRESS}" # of ours\n', ADDRESS),
        ("# repository-code: https://nowhere.example.org\n", None),
    ):
        citation.write_text(f"title: x\n{line}license: MIT\n", encoding="utf-8")
        assert setup_functions["repository"]() == expected
    urls = setup_functions["project_urls"](ADDRESS)
    assert urls["Source"] == ADDRESS
    assert all(url.startswith(ADDRESS) for url in urls.values())
    assert setup_functions["project_urls"](None) == {}


def recipe(target: str) -> list[str]:
    """Commands of a target of the Makefile."""
    found = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", text_of("Makefile"), re.M)
    assert found is not None, target
    return [line.strip() for line in found[1].splitlines()]


def test_make_help_has_a_line_for_every_target() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text_of("Makefile"), re.M)
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = dict(line.split("\t", 1) for line in shown.stdout.splitlines())
    assert set(lines) == set(phony.split()) == set(re.findall(r"^([a-z]+):", text_of("Makefile"), re.M))
    assert all(len(line) > 10 for line in lines.values())


def test_hooks_are_what_make_lint_runs() -> None:
    (local,) = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]
    assert local["repo"] == "local"  # nothing is fetched
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
    hooks = [hook["entry"].removesuffix(" --force-exclude") for hook in local["hooks"]]
    on_all = {"ruff check .": "ruff check", "ruff format --check .": "ruff format", "hadolint Dockerfile": "hadolint"}
    linted = [command.removeprefix("$(BIN)/") for command in recipe("lint")]
    assert hooks == [on_all.get(command, command) for command in linted]


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, lines put together."""
    lines = re.sub(r"\\\n\s*", "", text_of("Dockerfile")).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line and line[0] != "#")]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Name of a stage to what it builds on and its instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = (base, [])
        elif found:
            list(found.values())[-1][1].append((word, rest))
    return found


def test_the_image_installs_what_make_installs(setup_arguments: dict[str, Any]) -> None:
    arguments = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")
    (constraints,) = re.findall(r"^CONSTRAINTS \?= (.+)$", text_of("Makefile"), re.M)
    assert arguments["CONSTRAINTS"] == f'"{constraints}"'
    runs = [part for word, rest in stages()["build"][1] if word == "RUN" for part in rest.split("&&")]
    installed = [run.partition("pip install ")[2] for run in runs if "pip install " in run]
    shown = [shlex.split(run.replace("${CONSTRAINTS}", constraints)) for run in installed]
    assert shown == [
        ["--no-cache-dir", "-c", "constraints.txt", "-r", "requirements.txt"],
        ["--no-cache-dir", "-c", "constraints.txt", "."],
    ]
    assert len(setup_arguments["install_requires"]) > 10  # what requirements.txt says, by another test
    assert any("fcmae minkowski ${MINKOWSKI}" in run for run in runs)


def test_no_image_runs_as_root_and_only_cuda_has_a_compiler() -> None:
    found = stages()
    assert list(found) == ["build", "runtime", "cuda", "cpu"]  # the last is what docker build makes
    for name in ("cuda", "cpu"):
        base, steps = found[name]
        assert base == "runtime"
        assert steps[-1] == ("USER", "10001")
    installs = {name: {word for _, rest in steps for word in rest.split()} for name, (_, steps) in found.items()}
    assert [name for name in found if {"g++", "gcc"} & installs[name]] == ["build", "cuda"]


def test_the_image_is_given_what_it_copies(sources: Path) -> None:
    """.dockerignore lets in what setup.py reads and what is copied, and no tests, runs or libraries."""
    ignored = text_of(".dockerignore").splitlines()
    assert ignored[0] == "*"
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        name
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for name in rest.split()[:-1]
    }
    assert copied - {"."} <= allowed
    for entry in sources.iterdir():
        if entry.name not in allowed:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    assert setup_py(sources, "--name") == "sparse-fcmae"
    assert {"tests", "benchmarks", "docs"}.isdisjoint(allowed)

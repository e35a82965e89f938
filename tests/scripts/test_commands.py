"""The command ``fcmae``: its table, what it imports, how it refuses; scripts are the same functions."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import convnextv2
from convnextv2 import commands
from convnextv2.commands import COMMANDS, completion, dispatch, load
from convnextv2.recipes import recipes
from convnextv2.training import FinetuneOptions, PretrainOptions
from convnextv2.training.recipe import parse_options

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    path.stem: path
    for path in (ROOT / "scripts").glob("*.py")
    if path.stem != "warm_triton_cache"  # for machines that may lack what the package needs
}
BELOW = ("data", "evaluation", "export", "segmentation", "training", "weights")
PACKAGES = ("convnextv2", *(f"convnextv2.{name}" for name in BELOW))
HEAVY = "torch", "torchvision", "timm", "accelerate", "sklearn", "matplotlib"
NOT_FOR_HELP = (*HEAVY, "transformers", "safetensors", "huggingface_hub")


@pytest.fixture
def fcmae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit status, standard output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fcmae", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            commands.main()
        assert isinstance(stop.value.code, int)
        return stop.value.code, *capsys.readouterr()

    return run


def imported_by(*arguments: str) -> tuple[str, set[str]]:
    """What a command prints in a process of its own, and the modules that it imports for that."""
    program = (
        "import sys\nfrom convnextv2.commands import dispatch\n"
        f"try: dispatch({list(arguments)})\nexcept SystemExit as stop: assert not stop.code\n"
        "print('\\0', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    printed, modules = done.stdout.split("\0")
    return printed, set(modules.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module(name: str) -> None:
    assert callable(load(name))


def test_every_module_is_a_command() -> None:
    files = (ROOT / "convnextv2" / "commands").glob("[!_]*.py")
    assert {file.stem.replace("_", "-") for file in files} == set(COMMANDS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_the_function_of_a_command(script: str) -> None:
    """And holds nothing else that could differ."""
    (start,) = re.findall(r"^from convnextv2\.commands\.(\w+) import main$", SCRIPTS[script].read_text(), re.M)
    assert start.replace("_", "-") in COMMANDS
    tree = ast.parse(SCRIPTS[script].read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def test_every_command_but_three_is_a_script() -> None:
    called = {re.findall(r"commands\.(\w+) import main", path.read_text())[0] for path in SCRIPTS.values()}
    assert set(COMMANDS) - {name.replace("_", "-") for name in called} == {"recipes", "backends", "completion"}


def test_help_lists_the_commands_and_imports_next_to_nothing() -> None:
    printed, modules = imported_by("--help")
    assert re.findall(r"^  (\S+)  ", printed, re.M) == list(COMMANDS)
    assert not modules & {*HEAVY, "jsonargparse", "yaml", "numpy", "PIL"}


def test_help_of_a_command_imports_no_torch() -> None:
    """All in one process: what one imports, those after it would be blamed for."""
    ways = [[name] for name in COMMANDS] + [["segment", name] for name in completion.WITHIN["segment"]]
    program = (
        "import contextlib, io, sys\nfrom convnextv2.commands import dispatch\n"
        f"for way in {ways}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        try: dispatch([*way, '--help'])\n"
        "        except SystemExit as stop: assert not stop.code\n"
        "    assert ' '.join(['usage: fcmae', *way]) in out.getvalue()\n"
        f"    if found := sorted(sys.modules.keys() & set({NOT_FOR_HELP})):\n"
        "        print(*way, 'imports', *found)\n"
        "        break\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not done.stdout


COMPLETED = {
    "pre": "pretrain predict",
    "pretr": "pretrain",
    "pretrain --bat": "--batch-size",
    "pretrain --batch-size 3 --warm": "--warmup-epochs",
    "pretrain --precision b": "bf16",
    "pretrain --grn-scope ": "image batch",
    "segment ": "train predict evaluate",
    "segment train --decoder u": "upernet unet",
    "predict --col": "--columns",
    "evaluate lin": "linear",
    "convert --to on": "onnx",
    "download-data f": "flower_photos",
    "recipes --output READ": "README.md",
    "pretrain --config READ": "README.md",
    "--v": "--version",
}
"""What is typed behind fcmae to what bash offers, in the repository."""


def test_bash_completes_commands_options_and_choices(fcmae: Any, tmp_path: Path) -> None:
    status, out, err = fcmae("completion", "bash")
    assert (status, err) == (0, "")
    script = tmp_path / "fcmae.bash"
    script.write_text(out, encoding="utf-8")
    subprocess.run(["bash", "-n", script], check=True)
    program = [f"source {script}", "name=$(complete -p fcmae | sed 's/.*-F \\([^ ]*\\) .*/\\1/')"]
    for typed in COMPLETED:
        program += [
            f"COMP_WORDS=({shlex.join(['fcmae', *typed.split(' ')])})",
            "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()",
            '$name fcmae "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"',
            'echo "${COMPREPLY[@]}"',
        ]
    done = subprocess.run(["bash", "-c", "\n".join(program)], capture_output=True, text=True, cwd=ROOT, check=True)
    assert dict(zip(COMPLETED, done.stdout.split("\n"), strict=False)) == COMPLETED
    assert done.stderr == ""


def test_zsh_is_told_the_same(fcmae: Any) -> None:
    status, out, _ = fcmae("completion", "zsh")
    assert status == 0
    assert out.startswith("#compdef fcmae\n")
    assert set(COMMANDS) <= set(re.findall(r"^    ([\w-]+):'", out, re.M))
    assert f"    pretrain:'{COMMANDS['pretrain']}'" in out
    assert "--layer-decay-type[" in out
    assert sys.argv[0] == "fcmae completion"  # left as it was


def test_without_shtab_completion_says_how_to_get_it(fcmae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, out, err = fcmae("completion", "bash")
    assert (status, out) == (2, "")
    assert err == "error: completion needs shtab: pip install 'sparse-fcmae[completion]'\n"


def test_without_a_name_the_help_is_shown_and_the_status_is_2(fcmae: Any) -> None:
    status, out, err = fcmae()
    assert (status, err) == (2, "")
    assert out == fcmae("--help")[1]


def test_the_version(fcmae: Any) -> None:
    assert fcmae("--version") == (0, f"sparse-fcmae {convnextv2.__version__}\n", "")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pretrian", "'pretrian'; did you mean pretrain?"),
        ("model_card", "'model_card'; did you mean model-card?"),
        ("--hlep", "'--hlep'; fcmae --help lists them"),
        ("", "''; fcmae --help lists them"),
        ("../pretrain", "'../pretrain'; did you mean pretrain?"),
        ("_cli", "'_cli'; "),
        ("a\nb", "'a b'; "),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest(fcmae: Any, name: str, hint: str) -> None:
    status, out, err = fcmae(name)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: fcmae has no command {hint}")
    assert len(err.splitlines()) == 1


def test_usage_lines_name_what_was_called(fcmae: Any, script: Any) -> None:
    for name in ("pretrain", "predict", "model-card"):
        assert fcmae(name, "--help")[1].startswith(f"usage: fcmae {name} ")
    assert fcmae("segment", "predict", "--help")[1].startswith("usage: fcmae segment predict ")
    assert fcmae("segment", "train", "--help")[1].startswith("usage: fcmae segment train ")
    assert script("predict", "--help").out.startswith("usage: predict.py ")


def test_errors_and_statuses_are_those_of_the_scripts(fcmae: Any, script: Any, tmp_path: Path) -> None:
    for name, arguments in (
        ("pretrain", ["--data", tmp_path / "none", "--output", tmp_path / "run"]),
        ("pretrain", ["--epoks", 3]),
        ("predict", [tmp_path / "none.pth", tmp_path]),
        ("evaluate", ["classify", "x", "y", "--k", 3]),
    ):
        status, out, err = fcmae(name, *arguments)
        assert status == 2
        last = err.splitlines()[-1].replace("fcmae evaluate", "evaluate.py")
        other = script(name, *arguments)
        assert (status, out, last) == (other.status, other.out, other.err.splitlines()[-1])


@pytest.mark.slow
def test_a_module_can_be_launched(tmp_path: Path) -> None:
    """As by torchrun: two processes of one run, which torch's own launcher starts."""
    arguments = "--data digits --in-chans 1 --depths 1 1 1 1 --dims 8 8 8 8 --img-size 16 --patch-size 8 --epochs 1 "
    arguments += "--batch-size 512 --decoder-dim 8 --workers 0 --device cpu --backend reference --reconstruct-every 0"
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 -m convnextv2 pretrain "
    command = [sys.executable, *(launch + arguments).split(), "--probe", "none", "--output", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("in 1 epochs: ") == 1
    sessions = (tmp_path / "run" / "environment.json").read_text()
    assert '"processes": 2' in sessions
    assert '"command": "fcmae pretrain --data digits' in sessions


def test_recipes_are_listed_with_what_they_are_for(fcmae: Any) -> None:
    status, out, _ = fcmae("recipes")
    assert status == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes())
    assert all(re.fullmatch(r"\w+ +[A-Z].{20,120}[^.:]", line) for line in lines), out


def test_a_recipe_is_printed_and_copied(fcmae: Any, tmp_path: Path) -> None:
    text = recipes()["pretrain_small"].read_text(encoding="utf-8")
    assert fcmae("recipes", "pretrain_small") == (0, text, "")
    copy = tmp_path / "mine.yaml"
    assert fcmae("recipes", "pretrain_small", "--output", copy)[0] == 0
    assert copy.read_text(encoding="utf-8") == text
    copy.write_text("epochs: 3\n")
    status, _, err = fcmae("recipes", "pretrain_small", "--output", copy)
    assert status == 2
    assert "say --overwrite" in err
    assert copy.read_text() == "epochs: 3\n"
    assert fcmae("recipes", "pretrain_small", "--output", copy, "--overwrite")[0] == 0
    status, _, err = fcmae("recipes", "pretrain_smal")
    assert status == 2
    assert "did you mean pretrain_small?" in err
    assert fcmae("recipes", "--output", copy)[0] == 2


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = parse_options(PretrainOptions, ["--config", str(recipes()["pretrain_small"])])
    for name in ("small", "pretrain_small", "configs/pretrain_small.yaml", "../x/configs/pretrain_small.yaml"):
        assert parse_options(PretrainOptions, ["--config", name]) == expected
    assert parse_options(PretrainOptions, ["--config", "digits"]).blr != expected.blr
    assert parse_options(FinetuneOptions, ["--config", "small"]).min_steps == 300
    (tmp_path / "mine.yaml").write_text("config: pretrain_small\nepochs: 3\n")
    assert parse_options(PretrainOptions, ["--config", "mine.yaml"]).epochs == 3
    assert parse_options(PretrainOptions, ["--config", "digits", "mine.yaml"]).in_chans == 1
    (tmp_path / "small").mkdir()  # images, say
    assert parse_options(PretrainOptions, ["--config", "small"]) == expected
    (tmp_path / "small").rmdir()
    for path in ("small", "configs/pretrain_small.yaml"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("epochs: 77\n")
        assert parse_options(PretrainOptions, ["--config", path]).epochs == 77


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("smal", "smal: no such file, and no recipe of that name; did you mean small?"),
        ("finetune_tny", "did you mean finetune_tiny?"),
        ("zzz", "`fcmae recipes` lists those that there are"),
        ("early_stop", "no recipe of that name"),
    ],
)
def test_an_unknown_recipe_is_one_line_with_the_nearest(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)) as refused:
        parse_options(PretrainOptions, ["--config", name])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["nope.yaml", "configs/nope.yaml", "./small", "tests/none"])
def test_a_path_that_leads_nowhere_is_told_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=re.escape(str(Path(name)))):
        parse_options(PretrainOptions, ["--config", name])


@pytest.mark.parametrize("package", PACKAGES)
def test_a_stub_offers_what_the_package_does(package: str) -> None:
    module: Any = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).with_suffix(".pyi").read_text())
    origins = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("convnextv2")
        for alias in node.names
    }
    variants = set(convnextv2.VARIANTS) if package == "convnextv2" else set()
    assert origins.keys() | variants == set(module.__all__)
    for name, origin in origins.items():
        assert getattr(module, name) is getattr(importlib.import_module(str(origin)), name)
    assert {*module.__all__, "__all__"} <= set(dir(module))
    folder = Path(module.__file__).parent
    assert not {path.stem for path in folder.glob("*.py")} & set(module.__all__), "a submodule would hide the name"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_packages_import_no_torch() -> None:
    program = f"import sys, {', '.join(PACKAGES)}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_dispatch_returns_the_status() -> None:
    assert dispatch(["--version"]) == 0

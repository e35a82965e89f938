"""What is compiled when: ``compile`` auto, its obstacles, and what becomes of a run where compiling fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_helpers import finetune_options, make_images, pretrain_options, weights

from convnextv2 import create_fcmae
from convnextv2.training import compiling
from convnextv2.training.compiling import Compiling
from convnextv2.training.finetuning import FinetuneOptions, finetune
from convnextv2.training.pretraining import PretrainOptions, pretrain
from convnextv2.training.recipe import parse_options
from sparse_ops import registry
from sparse_ops.registry import BackendUnavailableError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "set")


def asked(monkeypatch: pytest.MonkeyPatch, device: str, runs: str = "triton", **changes: Any) -> tuple[Any, list[str]]:
    """Modes that are asked for by a pre-training on such a device, where a backend runs, and the lines it says."""
    changes = {"backend": "auto", **changes}
    options = pretrain_options("digits", Path("run"), **{k: v for k, v in changes.items() if k != "processes"})
    model = create_fcmae(options.encoder(), img_size=(32, 32), decoder_dim=16, backend=options.backend)
    lines: list[str] = []
    modes: list[Any] = []
    monkeypatch.setattr(type(model), "compile", lambda self, **given: modes.append(given))
    told: list[tuple[Any, ...]] = []

    def resolved(name: str, *of: Any) -> Any:
        told.append(of)
        return registry()[runs if name == "auto" else name]

    monkeypatch.setattr(compiling, "resolve_backend", resolved)
    accelerator: Any = SimpleNamespace(
        device=torch.device(device), num_processes=changes.get("processes", 1), mixed_precision="bf16"
    )
    Compiling(model, model, options, accelerator, lines.append)
    assert told in ([], [(torch.device(device), torch.bfloat16, 7)])
    return modes, lines


def test_auto_is_cuda_graphs_on_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, (line,) = asked(monkeypatch, "cuda")
    assert modes == [{"mode": "reduce-overhead"}]
    assert "`compile` none" in line
    assert asked(monkeypatch, "cpu") == ([], [])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"accum": 2}, "with `accum`"),
        ({"processes": 2}, "this run has 2"),
        ({"backend": "reference"}, "and reference runs"),
        ({"runs": "reference"}, "and reference runs"),
    ],
)
def test_what_stands_in_the_way_is_said_in_one_line(
    changes: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes, (line,) = asked(monkeypatch, "cuda:0", **changes)
    assert modes == []
    assert line.startswith("notice: no CUDA graphs (`compile` auto): ")
    assert why in line
    assert "\n" not in line


@pytest.mark.parametrize("compile", [None, "none"])
def test_nothing_is_compiled_or_said_where_that_is_asked(compile: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, "cuda", compile=compile) == ([], [])


def test_a_mode_that_is_named_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, "cuda", compile="default", accum=2, runs="reference") == ([{"mode": "default"}], [])


def test_a_backend_that_cannot_run_is_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*of: Any) -> Any:
        raise BackendUnavailableError("not here")

    monkeypatch.setattr(compiling, "resolve_backend", refused)
    accelerator: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=1, mixed_precision="no")
    options = pretrain_options("digits", Path("run"))
    model = create_fcmae(options.encoder(), img_size=(32, 32), decoder_dim=16)
    with pytest.raises(BackendUnavailableError, match="not here"):
        Compiling(model, model, options, accelerator, pytest.fail)


@pytest.mark.parametrize("kind", [PretrainOptions, FinetuneOptions])
def test_recipes_and_command_lines(kind: Any, tmp_path: Path) -> None:
    """The default, what recipes of before hold, and every value."""
    recipe = tmp_path / "old.yaml"
    recipe.write_text("compile: null\n")
    where = ["--data", "digits", "--output", str(tmp_path / "run")]
    assert parse_options(kind, where).compile == "auto"
    assert parse_options(kind, [*where, "--config", str(recipe)]).compile is None
    for value in ("auto", "none", "default", "reduce-overhead", "max-autotune"):
        options = parse_options(kind, [*where, "--config", str(recipe), "--compile", value])
        assert options.compile == value
        options.check()
    with pytest.raises(ValueError, match="compile"):
        parse_options(kind, [*where, "--compile", "fast"])


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` finds nothing in its way in a run that is on a processor."""
    monkeypatch.setattr(Compiling, "_suits", lambda *of: True)


class BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        raise RuntimeError("no capture\nof this")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_goes_on_without_graphs_that_fail(
    where: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is the same run, bit by bit: nothing of what was tried is left in gradients, masks or random numbers."""
    pretrain(pretrain_options(images, tmp_path / "plain", drop_path=0.5, compile="none", epochs=1))
    on_a_gpu(monkeypatch)
    calls: list[Any] = []

    def fails(function: Any, *, disable: bool = False, **_: Any) -> Any:
        def compiled(*given: Any) -> Any:
            calls.append(given)
            if where == "forward":
                raise RuntimeError("no capture\nof this")
            loss, pred = function(*given)
            return BrokenBackward.apply(loss), pred

        return function if disable else compiled

    monkeypatch.setattr(torch, "compile", fails)
    lines: list[str] = []
    pretrain(pretrain_options(images, tmp_path / "tried", drop_path=0.5, epochs=1), log=lines.append)
    assert len(calls) == 1
    (told,) = [line for line in lines if "CUDA graphs" in line]
    assert told == (
        "notice: going on without CUDA graphs (`compile` auto), which fail here: RuntimeError: no capture of this"
    )
    plain, tried = weights(tmp_path / "plain"), weights(tmp_path / "tried")
    assert all(torch.equal(value, tried[name]) for name, value in plain.items())


def test_what_works_is_kept_and_what_tried_it_leaves_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(pretrain_options(images, tmp_path / "plain", drop_path=0.5, compile="none", epochs=1))
    on_a_gpu(monkeypatch)
    calls: list[Any] = []

    def counted(function: Any, *, mode: str, fullgraph: bool) -> Any:
        def compiled(*given: Any) -> Any:
            calls.append(mode)
            return function(*given)

        return compiled

    monkeypatch.setattr(torch, "compile", counted)
    lines: list[str] = []
    pretrain(pretrain_options(images, tmp_path / "tried", drop_path=0.5, epochs=1), log=lines.append)
    assert calls == ["reduce-overhead"] * (3 + 3)  # 15 images in batches of 4, after what was tried
    assert not any("CUDA graphs" in line for line in lines)
    tried = weights(tmp_path / "tried")
    assert all(torch.equal(value, tried[name]) for name, value in weights(tmp_path / "plain").items())


def test_fine_tuning_compiles_nothing_by_itself(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", pytest.fail)
    options = finetune_options(images, tmp_path / "run", epochs=1)
    assert options.compile == "auto"
    finetune(options)
    model: Any = torch.nn.Linear(2, 2)
    accelerator: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=1, mixed_precision="no")
    Compiling(model, model, options, accelerator, pytest.fail)
    assert model._compiled_call_impl is None

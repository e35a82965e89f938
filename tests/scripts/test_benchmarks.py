"""The benchmarks run, agree with dense in the run that they time, and write what they print."""

import gzip
import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import match  # noqa: E402
import ops  # noqa: E402
import profile_step  # noqa: E402
import torch  # noqa: E402
from common import Contender, agreement  # noqa: E402  # a script's folder
from encoder import encoder_flop  # noqa: E402
from match import Match, Result, graph_pool_bytes  # noqa: E402

from convnextv2.models.config import encoder_config  # noqa: E402
from sparse_ops import Backend, get_backend  # noqa: E402


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return forked.run(ROOT / "benchmarks" / script, *arguments, timeout=300)


SMALL = ("--models", "atto", "--batch-size", 1, "--img-size", 64, "--repeats", 2, "--warmup", 1, "--threads", 1)


@pytest.mark.parametrize(
    ("script", "extra", "rows"),
    [
        ("encoder.py", ("--no-compile", "--what", "encoder", "step"), 4),
        ("ops.py", ("--stages", 3, 4), 10),
        ("finetune_step.py", ("--no-compile",), 1),
    ],
)
def test_it_runs_and_writes_its_results(script, extra, rows, tmp_path):
    done = run(script, *SMALL, *extra, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["results"]) == rows
    assert report["hardware"]["torch"]
    assert report["options"]["img_size"] == [64, 64]
    assert sum(line.startswith("convnextv2_atto") for line in done.stdout.splitlines()) == rows
    done = run("gather.py", tmp_path / "out.json", "--markdown", tmp_path / "r.md", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.md").read_text().count("| convnextv2_atto") == rows


def test_the_dense_network_is_compared_with_timm(tmp_path):
    done = run(
        "dense.py",
        *SMALL,
        "--batch-size",
        4,
        "--no-compile",
        "--what",
        "step",
        "predict-one",
        "--json",
        tmp_path / "out.json",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    names = ["ours", "ours-torch", "timm", "timm+channels-last", "transformers"]
    assert [(r["what"], r["contender"]) for r in results] == [(w, n) for w in ("step", "predict-one") for n in names]
    assert all(
        set(r["speedup"]) == ({"timm", "transformers", "ours-torch"} if r["contender"] == "ours" else set())
        for r in results
    )
    memory = {r["contender"]: r["activation_mb"] for r in results if r["what"] == "step"}
    assert memory["ours"] < 0.75 * memory["ours-torch"]  # a half for large images


def test_epochs_are_measured_against_the_step(image_folder, tmp_path):
    photos = image_folder({"": 9}, name="photos")
    options = "--images", 9, "--batch-size", 2, "--turn", 2, "--img-size", 64, "--repeats", 1, "--workers", 1
    done = run("epoch.py", photos, *options, "--ways", "files", "cache", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["options"]["data"] == str(Path(*photos.parts[-2:]))  # no folder of somebody
    assert [(row["way"], row["images"]) for row in report["results"]] == [("files", 8), ("cache", 8)]
    for row in report["results"]:
        paces = zip(row["loaded_images_per_s"], row["bare_images_per_s"], strict=True)
        ratios = [loaded / bare for loaded, bare in paces]
        assert len(ratios) == 2  # of the second epoch
        assert row["ratio"] == pytest.approx(sum(ratios) / 2, rel=1e-2)
        assert row["ratio_se"] == pytest.approx(abs(ratios[0] - ratios[1]) / 2, abs=2e-2)
        assert row["first_ratio"] > 0
    done = run("epoch.py", photos, *options[2:], "--images", 12)
    assert done.returncode == 1
    assert done.stderr.endswith("expected 12 images, found 9; say --images\n")


def test_what_saving_costs_is_measured(image_folder, tmp_path):
    photos = image_folder({"": 24}, name="photos")
    options = "--models", "atto", "--batch-size", 1, "--img-size", 64, "--repeats", 3, "--json", tmp_path / "out.json"
    done = run("saving.py", photos, *options)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(row["waits"]) == 6  # five inside of the epoch, one after it
    assert row["wait_in_steps"] == pytest.approx(row["wait"] / row["step"])
    assert 70 < row["state_mib"] < 100  # weights and two moments
    assert f"a save of {row['state_mib']:.0f} MiB waits" in done.stdout


def test_ways_of_loading_are_measured(tmp_path):
    options = "--samples", 8, "--repeats", 1, "--img-size", 32, "--batch-size", 4, "--views", 2
    done = run("loader.py", *options, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["results"]) == 9
    for row in report["results"]:
        assert 0 < row["least_ms"] <= row["processor_ms"] <= row["most_ms"]
        assert row["samples_per_s"] == pytest.approx(1e3 / row["processor_ms"])
        assert any(line.startswith(row["way"]) for line in done.stdout.splitlines())


def test_windows_of_scenes_are_measured(tmp_path):
    options = "--side", 500, "--window", 64, "--windows", 5, "--repeats", 2, "--scenes", 2, 8
    done = run("scenes.py", *options, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["windows"] for row in report["results"]] == [64, 64]
    for row in report["results"]:
        assert 0 < row["least"] <= row["windows_per_s"] <= row["most"]
        assert row["own_mib"] == pytest.approx(row["peak_mib"] - row["at_start_mib"])


def test_roofline_counts_every_part(tmp_path):
    done = run("roofline.py", *SMALL, "--json", tmp_path / "out.json", "--plot", tmp_path / "roof.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["part"]: row for row in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert len(rows) == 22
    # One visible patch of four at 64×64: 64, 16, 4, 1 cells, whose every tap inside of the patch is visible.
    cells, dims, depths = (64, 16, 4, 1), (40, 80, 160, 320), (2, 2, 6, 2)
    expected = 4 * cells[0] * 48 * dims[0]  # the stem, forward and one of two gradients
    for number, (n, channels, depth) in enumerate(zip(cells, dims, depths, strict=True)):
        side = round(n**0.5)
        taps = sum(max(0, side - abs(offset)) for offset in range(-3, 4)) ** 2
        assert rows[f"stage {number + 1} convolution"]["gflop"] == pytest.approx(6e-9 * depth * taps * channels)
        expected += 6 * depth * (taps * channels + 8 * n * channels**2)
        expected += 6 * n * 4 * dims[number - 1] * channels if number else 0
    assert rows["encoder"]["gflop"] == pytest.approx(expected * 1e-9)
    decoder = 6 * (1 * 320 * 512 + 16 * 512 + 4 * 512**2 * (4 + 3) + 3 * 512 * 3072)
    assert rows["step"]["gflop"] == pytest.approx((expected + decoder) * 1e-9)
    for row in rows.values():
        assert 0 < row["forward_ms"] <= row["ms_max"]
        assert row["of_peak"] == 0 or row["gflop"] > 0


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("loader.py", ("nowhere",), "no such folder"),
        ("loader.py", ("--views", 0), "at least 1"),
        ("scenes.py", ("--side", 0), "at least 1"),
        ("encoder.py", ("--models", "gigantic"), "unknown models"),
        ("encoder.py", ("--backends", "cpu+speed"), "after + only"),
        ("encoder.py", ("--backends", "abacus"), "unknown backend"),
        ("ops.py", ("--backend", "cpu", "--dtype", "float16"), "float16"),
        ("ops.py", ("--batch-size", 0), "at least 1"),
        ("roofline.py", ("--img-size", 100), "not divisible by the patch size"),
        ("roofline.py", ("--backend", "reference"), "take one that fuses it"),
        ("roofline.py", ("--plot", "roof.jpeg"), "ends in .png, .svg or .pdf"),
    ],
)
def test_bad_options_are_one_line(script, arguments, message):
    done = run(script, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_a_contender_that_fails_or_differs_is_left_out_and_told():
    weight = torch.ones(3, requires_grad=True)

    def contender(name: str, factor: float) -> Contender:
        def forward() -> tuple[torch.Tensor, torch.Tensor]:
            if not factor:
                raise ZeroDivisionError("compiled\nto nothing")
            out = weight * factor
            return out.sum(), out

        return Contender(name, forward, [weight])

    contenders = [contender(*c) for c in (("dense", 1), ("wrong", 1.1), ("broken", 0), ("right", 1.00001))]
    agreeing, errors, failures = agreement(contenders, contenders[0], "float32", "atto")
    assert [c.name for c in agreeing] == ["dense", "right"]
    assert errors == {"right": pytest.approx(1e-5, rel=0.1)}
    assert failures[0].startswith("atto, wrong: differs from dense masked by 1.0e-01")
    assert failures[1:] == ["atto, broken: ZeroDivisionError: compiled"]


def weighing(name: str, factor: float, weight: torch.Tensor, fails_at: int = 0) -> Contender:
    """Multiplies by ``factor``; raises in one of its passes, counted from 1."""
    passes = iter(range(1, 1000))

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        if next(passes) == fails_at:
            raise torch.OutOfMemoryError(f"pass {fails_at}\nof {name}")
        out = weight * factor
        return out.sum(), out

    return Contender(name, forward, [weight])


def matched(**made: tuple[float, int]) -> tuple[dict[str, Result], list[list[Result]]]:
    """Results by name, and what was told on the way."""
    weight, told = torch.ones(3, requires_grad=True), []
    plan = {name: partial(weighing, name, factor, weight, at) for name, (factor, at) in made.items()}
    args = Namespace(device="cpu", dtype="float32", batch_size=1, repeats=3, warmup=1)
    rows = Match(
        args, plan, partial(Result, "atto", "encoder"), lambda rows: told.append([replace(r) for r in rows])
    ).run()
    return {row.backend: row for row in rows}, told


def test_results_are_told_as_they_come_and_provisional_until_the_end():
    rows, told = matched(**{"dense": (1, 0), "dense-compiled": (1, 0), "triton": (1, 0), "triton+graphs": (1, 0)})
    names = [[row.backend for row in rows] for rows in told]
    assert names[:3] == [["dense"], ["dense", "triton"], ["dense", "dense-compiled", "triton"]]  # compiled ones later
    assert names[3] == names[4] == list(rows)
    assert all(row.provisional for row in told[3])
    assert not any(row.provisional for row in told[4])
    assert [len(row.times_ms) for row in rows.values()] == [3] * 4
    assert told[1][1].speedup is not None
    for row in rows.values():
        assert row.activation_mb is not None


def test_a_rival_that_fails_is_named_beside_the_ratio():
    rows, _ = matched(**{"dense": (1, 0), "dense-compiled": (1.1, 0), "triton": (1, 0)})
    assert rows["dense-compiled"].note.startswith("differs from dense masked by 1.0e-01")
    assert rows["dense-compiled"].speedup is rows["dense-compiled"].ms_per_image is None
    assert rows["triton"].against.startswith("dense; not dense-compiled: differs from dense masked by 1.0e-01")


def test_without_memory_for_eager_dense_the_compiled_one_is_the_rival():
    rows, _ = matched(**{"dense": (1, 1), "dense-compiled": (1, 0), "triton": (1, 0), "wrong": (2, 0)})
    assert rows["dense"].note == "OutOfMemoryError: pass 1"
    assert rows["triton"].against == "dense-compiled; not dense: OutOfMemoryError: pass 1"
    assert rows["triton"].error == 0
    assert rows["triton"].speedup is not None
    assert rows["wrong"].note.startswith("differs")


def test_a_contender_that_fails_when_it_is_timed_has_no_figures():
    rows, _ = matched(dense=(1, 0), triton=(1, 5))
    assert rows["triton"].note == "OutOfMemoryError: pass 5"
    assert rows["triton"].ms_per_image is rows["triton"].speedup is None
    assert len(rows["dense"].times_ms) == 3


def test_without_any_dense_network_there_is_no_figure():
    rows, _ = matched(dense=(1, 1), triton=(1, 0))
    assert "no dense network ran" in rows["triton"].note
    assert rows["triton"].ms_per_image is None


def test_memory_of_cuda_graphs_is_that_of_their_pools(monkeypatch):
    segments = [{"total_size": 5, "segment_pool_id": (0, 0)}, {"total_size": 7, "segment_pool_id": (0, 3)}]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert graph_pool_bytes(torch.device("cuda")) == 7
    assert graph_pool_bytes(torch.device("cpu")) == 0
    held = iter([10 * 2**20, 40 * 2**20])
    monkeypatch.setattr(match, "graph_pool_bytes", lambda device: next(held))
    rows, _ = matched(dense=(1, 0))
    assert 30 <= rows["dense"].activation_mb < 31


class Broken(Backend):
    """The reference, but the gradient for the weight is wrong and that for x fails."""

    name = summary = "broken"
    priority = -99

    def unavailable_reason(self):
        return None

    def rejects(self, device, dtype, kernel_size):
        return None

    def depthwise(self, x, weight, bias, active, *, reverse_taps):
        if reverse_taps:
            raise RuntimeError("no kernel image\nis available")
        return get_backend("reference").depthwise(x, weight, bias, active, reverse_taps=False)

    def depthwise_weight_grad(self, x, grad, active, kernel_size):
        return 1.5 * get_backend("reference").depthwise_weight_grad(x, grad, active, kernel_size)


def test_a_wrong_kernel_is_a_result_and_the_others_are_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ops, "resolve_backend", lambda name, device: Broken())
    small = [
        "--models",
        "atto",
        "--batch-size",
        "1",
        "--img-size",
        "64",
        "--repeats",
        "2",
        "--warmup",
        "1",
        "--stages",
        "4",
    ]
    assert ops.main([*small, "--json", str(tmp_path / "o.json")]) == 2
    right, fails, wrong = json.loads((tmp_path / "o.json").read_text())["results"]
    assert right["against_dense"] > 0
    assert right["note"] is None
    assert fails["note"] == "RuntimeError: no kernel image"
    assert fails["us"] is None
    assert wrong["note"].startswith("results differ from dense by 5.0e-01")
    assert wrong["against_dense"] is None
    assert wrong["us"] > 0
    assert "stage 4, depthwise, grad of x: RuntimeError: no kernel image" in capsys.readouterr().err


def test_the_clock_comes_from_nvidia_smi_where_torch_does_not_tell(monkeypatch, tmp_path):
    assert ops.clock_hz(Namespace(clock_rate=1980000)) == 1.98e9
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ops.clock_hz(Namespace(uuid="x")) is None
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 1755\n")
    smi.chmod(0o755)
    assert ops.clock_hz(Namespace(uuid="x")) == 1.755e9


def test_a_profile_has_kernels_and_a_trace(tmp_path, capsys):
    small = ["--models", "atto", "--batch-size", "1", "--img-size", "64", "--repeats", "1", "--warmup", "1"]
    assert profile_step.main([*small, "--device", "cpu", "--json", str(tmp_path / "profile.json")]) == 0
    report = json.loads((tmp_path / "profile.json").read_text())
    assert "ms a step without the profiler" in report["hardware"]["convnextv2_atto"]
    assert sum(row["share"] for row in report["results"]) == pytest.approx(1, abs=0.1)
    assert any("sparse_ops::" in row["kernel"] for row in report["results"])
    trace = json.loads(gzip.decompress((tmp_path / "profile.trace.json.gz").read_bytes()))
    assert trace["traceEvents"]


@pytest.mark.parametrize(
    ("name", "published"),
    [("atto", 0.55), ("femto", 0.78), ("pico", 1.37), ("nano", 2.45), ("tiny", 4.47), ("base", 15.4), ("huge", 115)],
)
def test_flop_are_the_published_ones(name, published):
    """Published figures are billions of multiply-adds of the forward pass at 224×224, the head included."""
    assert encoder_flop(encoder_config(f"convnextv2_{name}"), 49) / 6e9 == pytest.approx(published, rel=0.01)

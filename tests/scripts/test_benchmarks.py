"""The benchmarks run, agree with dense in the run that they time, and write what they print."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch  # noqa: E402
from common import Contender, agreement  # noqa: E402  # a script's folder
from encoder import encoder_flop  # noqa: E402

from convnextv2.models.config import encoder_config  # noqa: E402


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


SMALL = ("--models", "atto", "--batch-size", 1, "--img-size", 64, "--repeats", 2, "--warmup", 1, "--threads", 1)


@pytest.mark.parametrize(
    ("script", "extra", "rows"),
    [("encoder.py", ("--no-compile", "--what", "encoder", "step"), 4), ("ops.py", ("--stages", 3, 4), 10)],
)
def test_it_runs_and_writes_its_results(script, extra, rows, tmp_path):
    done = run(script, *SMALL, *extra, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["results"]) == rows
    assert report["hardware"]["torch"]
    assert report["options"]["img_size"] == [64, 64]
    assert sum(line.startswith("convnextv2_atto") for line in done.stdout.splitlines()) == rows
    done = run("report.py", tmp_path / "out.json", "--markdown", tmp_path / "r.md", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.md").read_text().count("| convnextv2_atto") == rows


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


@pytest.mark.parametrize(
    ("name", "published"),
    [("atto", 0.55), ("femto", 0.78), ("pico", 1.37), ("nano", 2.45), ("tiny", 4.47), ("base", 15.4), ("huge", 115)],
)
def test_flop_are_the_published_ones(name, published):
    """Published figures are billions of multiply-adds of the forward pass at 224×224, the head included."""
    assert encoder_flop(encoder_config(f"convnextv2_{name}"), 49) / 6e9 == pytest.approx(published, rel=0.01)

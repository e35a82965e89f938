"""``scripts/model_card.py``: what it says is what the run and the evaluation say."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"

RUN = [
    "--epochs", 2, "--batch-size", 4, "--img-size", 32, "--patch-size", 16, "--device", "cpu", "--workers", 0,
    "--depths", 1, 1, 1, 1, "--dims", 8, 16, 16, 24, "--decoder-dim", 16,
]  # fmt: skip
WORDS = ["--images", "Noise of three colours.", "--licence", "cc0-1.0", "--limit", "Nothing at all.", "No photographs."]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run, its weights and evaluations."""
    folder = tmp_path_factory.mktemp("card")
    for number, name in enumerate(("red", "green", "blue")):
        (folder / "photos" / name).mkdir(parents=True)
        for index in range(6):
            pixels = np.full((40, 30, 3), 10 * index, np.uint8)
            pixels[..., number] += 150
            Image.fromarray(pixels).save(folder / "photos" / name / f"{index}.png")

    def run(name: str, *arguments: object) -> None:
        forked.run(SCRIPTS / f"{name}.py", *arguments, cwd=folder).check_returncode()

    quick = ["--device", "cpu", "--workers", 0]
    run("pretrain", "--data", "photos", "--output", "pre", *RUN)
    run("convert_sparse_to_dense", "pre", "backbone.safetensors")
    run("evaluate", "knn", "pre", "photos", "--output", "knn.json", *quick)
    run("evaluate", "knn", "pre", "photos", "--untrained", "--output", "untrained.json", *quick)
    fraction = ["--label-fraction", 0.5, "--pooling", "mean_std"]
    run("evaluate", "linear", "pre", "photos", "--output", "linear.json", *fraction, *quick)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A copy of them, to work in."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "place"))
    return tmp_path / "place"


def test_it_tells_what_was_done_and_measured(place, script):
    options = ["--weights", "backbone.safetensors", "--evaluation", "knn.json", "untrained.json", "linear.json"]
    result = script("model_card", "pre", *WORDS, *options)
    assert (result.status, result.out) == (0, "model card: MODEL_CARD.md\n")
    card = ModelCard.load(place / "MODEL_CARD.md")
    assert (card.data.license, card.data.model_name) == ("cc0-1.0", "pre")
    knn, linear = (json.loads((place / name).read_text()) for name in ("knn.json", "linear.json"))
    assert [found.metric_value for found in card.data.eval_results] == [
        round(one["top1"] / 100, 4) for one in (knn, linear)
    ]
    text = card.text
    assert "| knn, mean, untrained | 3 |" in text
    assert f"| linear, mean_std, 50 % of the labels | 3 | {linear['top1']:.1f} % |" in text
    rows = [json.loads(line) for line in (place / "pre/metrics.jsonl").read_text().splitlines()]
    assert f"2 epochs, {rows[-1]['step']} steps" in text
    assert f"loss {rows[0]['loss']:.3f} after the first epoch, {rows[1]['loss']:.3f} at the end" in text
    assert "| decoder_dim | 16 |" in text
    assert "mask_ratio" not in text, "only what is not as usual"
    assert "photos" not in text, "no paths of the run"
    weights = (place / "backbone.safetensors").read_bytes()
    assert f"{len(weights):,} bytes, SHA-256 `{hashlib.sha256(weights).hexdigest()}`" in text
    assert "- Nothing at all.\n- No photographs.\n- Images of 32 × 32 pixels" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, object] = {"images": torch.zeros(2, 3, 64, 32)}
    exec(code, names)
    assert names["features"].shape == (2, 24, 4, 2)
    assert f"encoder has {sum(p.numel() for p in names['encoder'].parameters()):,} parameters" in text
    assert script("model_card", "pre", *WORDS, *options).status == 0, "an earlier card is replaced"


def test_a_classifier_and_a_file_alone(place, script):
    fine = [*RUN[:12], "--output", "fine", "--init", "pre"]
    assert script("finetune", "--data", "photos", *fine).status == 0
    assert script("model_card", "fine", *WORDS, "--output", "fine.md").status == 0
    text = (place / "fine.md").read_text()
    assert "A classifier of ConvNeXt V2" in text
    assert "## Training" in text
    assert script("model_card", "backbone.safetensors", *WORDS, "--output", "bare.md", "--name", "a name").status == 0
    text = (place / "bare.md").read_text()
    assert "# a name\n\nThe encoder, without decoder or head, of" in text
    assert "## Training" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "knn.json"], "knn.json"),
        (["--output", "backbone.safetensors"], "backbone.safetensors"),
        (["--output", "notes.md"], "notes.md"),
        (["--evaluation", "backbone.safetensors"], "is no result of fcmae evaluate"),
        (["--evaluation", "pre/config.yaml"], "is no result of fcmae evaluate"),
        (["--evaluation", "none.json"], "none.json"),
        (["--weights", "none.safetensors"], "none.safetensors"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(options, message, place, script):
    (place / "notes.md").write_text("# mine")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    result = script("model_card", "pre", *WORDS, *options)
    assert result.status == 2
    told = result.err.splitlines()[-1]
    assert "error: " in told
    assert message in told
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_a_course_that_is_none_is_told(place, script):
    (place / "pre/metrics.jsonl").write_text('{"epoch": 1}\n')
    result = script("model_card", "pre", *WORDS)
    assert (result.status, (place / "MODEL_CARD.md").exists()) == (2, False)
    assert "does not tell the course" in result.err

"""The whole path on windows of scenes: statistics, check, pre-training, conversion, fine-tuning, results."""

import csv
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from convnextv2.data.statistics import FILE
from convnextv2.training import PretrainOptions, RunStoppedError, pretrain

SIZE, NO_DATA = (200, 260), 0
TINY = (
    *("--window", 64, "--img-size", 32, "--patch-size", 8, "--epochs", 2, "--batch-size", 8, "--workers", 0),
    *("--warmup-epochs", 0, "--tracker", "none", "--device", "cpu", "--augment", "satellite"),
)
SHAPE = "--depths", 1, 1, 1, 1, "--dims", 8, 16, 16, 24


@pytest.fixture
def scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of three scenes of four bands, 12 bits, tiled, whose left two fifths have no data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for number in range(6):
        kind = number % 2
        values = rng.integers(1, 2000, (*SIZE, 4)) + 1500 * kind * (np.arange(4) % 2)
        values[:, : 2 * SIZE[1] // 5] = NO_DATA
        place = tmp_path / "scenes" / ("dry", "wet")[kind] / f"{number}.tif"
        place.parent.mkdir(parents=True, exist_ok=True)
        how: dict[str, Any] = {"tile": (32, 32), "compression": "zlib", "photometric": "minisblack"}
        tag = [(42113, "s", 0, str(NO_DATA), True)]
        tifffile.imwrite(place, values.astype(np.uint16), planarconfig="contig", extratags=tag, **how)
    return tmp_path / "scenes"


def ran(script: Any, name: str, *arguments: object) -> Any:
    done = script(name, *arguments)
    assert done.status == 0, done.err
    return done


@pytest.mark.slow
def test_the_whole_path_on_windows(script, scenes, tmp_path):
    done = ran(script, "compute_stats", scenes, "--window", 64, "--output", tmp_path / "s.png", "--processes", 1)
    assert "windows, in the units of the files" in done.out
    kept = json.loads((scenes / FILE).read_text())
    assert kept["bands"][0]["low"] >= 1
    done = ran(script, "check_data", scenes, "--window", 64, "--output", tmp_path / "c.csv", "--processes", 1)
    assert "6 of 6 files are images that can be read" in done.out
    pre, fine, dense = tmp_path / "pre", tmp_path / "fine", tmp_path / "dense.safetensors"
    how = *TINY, *SHAPE, "--decoder-dim", 16, "--in-chans", 4, "--probe", "none"
    done = ran(script, "pretrain", "--data", scenes, "--output", pre, *how)
    assert "windows of 64×64 pixels: 72 images" in done.err
    assert "window:\n- 64\n- 64\n" in (pre / "config.yaml").read_text()
    losses = [json.loads(line)["loss"] for line in (pre / "metrics.jsonl").read_text().splitlines()]
    again = tmp_path / "again"
    ran(script, "pretrain", "--data", scenes, "--output", again, *how, "--workers", 2)
    assert [json.loads(line)["loss"] for line in (again / "metrics.jsonl").read_text().splitlines()] == losses
    ran(script, "convert_sparse_to_dense", pre, dense)
    ran(script, "finetune", "--data", scenes, "--output", fine, "--init", dense, *TINY, "--lr", 0.01)
    table = tmp_path / "results.csv"
    done = ran(script, "predict", fine, scenes, "--window", 64, "--output", table)
    assert "72 windows classified, 0 unreadable, 48 mostly without data" in done.out
    rows = list(csv.DictReader(table.open()))
    assert {(row["x"], row["y"]) for row in rows} == {
        (str(x), str(y)) for x in (98, 147, 196) for y in (0, 45, 91, 136)
    }
    assert len({row["file"] for row in rows}) == 6
    done = ran(script, "embed", fine, scenes, "--window", 64, "--output", tmp_path / "f.npz")
    assert "72 images embedded, 0 unreadable, 48 windows mostly without data" in done.out
    found = np.load(tmp_path / "f.npz")
    assert found["features"].shape == (72, 24)
    assert found["names"][0].endswith("0.tif[x=98,y=0]")
    ran(script, "visualize", pre, scenes, "--window", 64, "--output", tmp_path / "v.png")


def test_a_run_inside_of_an_epoch_goes_on_with_the_same_windows(scenes, tmp_path):
    how: dict[str, Any] = {
        "data": scenes, "window": 64, "img_size": 32, "patch_size": 8, "in_chans": 4, "epochs": 2, "batch_size": 8,
        "depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24), "decoder_dim": 16, "workers": 0, "warmup_epochs": 0.0,
        "tracker": "none", "device": "cpu", "probe": "none", "compile": "none", "crop": "native",
    }  # fmt: skip
    whole = pretrain(PretrainOptions(output=tmp_path / "whole", **how))
    seen = 0

    def stop(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 17:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(RunStoppedError):
        pretrain(PretrainOptions(output=tmp_path / "parts", **how), on_loss=stop)
    parts = pretrain(PretrainOptions(output=tmp_path / "parts", resume=True, **how))
    assert parts.last_loss == whole.last_loss
    for name, value in whole.model.state_dict().items():
        np.testing.assert_array_equal(parts.model.state_dict()[name].numpy(), value.numpy())


def test_a_large_file_is_told_how_it_is_read(script, scenes, tmp_path):
    how = "--output", tmp_path / "run", *TINY[2:], *SHAPE, "--in-chans", 4, "--probe", "none"
    done = script("pretrain", "--data", scenes, *how, "--max-pixels", 1000)
    assert done.status == 2
    assert "--window reads a TIFF, .npy or .zarr in parts" in done.err
    done = script("pretrain", "--data", scenes / "dry" / "0.tif", *how)
    assert done.status == 2
    assert "0.tif: one image, expected a folder of them; --window reads a scene in parts" in done.err
    for wrong in (("--window", "0"), ("--window", 64, "--cache", tmp_path / "cached")):
        done = script("pretrain", "--data", scenes, *how, *wrong)
        assert done.status == 2
        assert len(done.err.splitlines()) == 1

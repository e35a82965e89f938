"""Runs on parquet files, on data sets of Hugging Face and on piped shards are the runs on the files: in any number of
processes, and stopped within an epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import launching
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from pyarrow import parquet as pq
from test_pretraining import stop_in_epoch
from train_helpers import make_images, pretrain_options, weights

from convnextv2.data.shard_writing import write_shards
from convnextv2.training import RunStoppedError, finetune, pretrain
from convnextv2.training.finetuning import FinetuneOptions

KINDS = ("parquet", "hub", "pipe")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same images by their kinds of source."""
    root = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        files = sorted(make_images(root / "files", count=5).glob("*/*.png"))
        classes = sorted({file.parent.name for file in files})
        cells = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        labels = [classes.index(file.parent.name) for file in files]
        features = Features({"image": Image(), "label": ClassLabel(names=classes)})
        rows = Dataset.from_dict({"image": cells, "label": labels}, features)
        rows.save_to_disk(root / "hub", num_shards=2)
        pq.write_table(pa.table({"image": cells, "label": labels}), root / "images.parquet", row_group_size=4)
        write_shards(root / "files", root / "shards", samples=8)
    piped = f"pipe:cat {root}/shards/{{000000..000001}}.tar"
    return {"files": f"{root}/files", "parquet": f"{root}/images.parquet", "hub": f"{root}/hub", "pipe": piped}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def whole(sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the files."""
    output = tmp_path_factory.mktemp("whole") / "run"
    pretrain(pretrain_options(sets["files"], output))
    return output


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_within_an_epoch_it_ends_as_the_run_on_the_files(
    sets: dict[str, str], whole: Path, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "run"
    with pytest.raises(RunStoppedError, match="is saved"):
        pretrain(pretrain_options(sets[kind], output), progress=stop_in_epoch(2))
    pretrain(pretrain_options(sets[kind], output, workers=2, resume=True))
    assert losses(output) == losses(whole)
    expected, found = weights(whole), weights(output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_the_run_of_one(sets: dict[str, str], tmp_path: Path, kind: str) -> None:
    found = []
    for processes, size in ((1, 4), (2, 2)):
        output = tmp_path / str(processes)
        sizes = f"--batch-size {size} --epochs 2 --decoder-dim 16 --probe none --reconstruct-every 0 --device cpu"
        given = [*launching.TINY, *sizes.split(), "--data", sets["files" if processes == 1 else kind]]
        launching.run(processes, "pretrain", *given, "--output", output)
        found.append(losses(output))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_fine_tuning_takes_their_labels(sets: dict[str, str], tmp_path: Path) -> None:
    about: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "img_size": (32, 32), "patch_size": 8}
    about |= {"workers": 0, "batch_size": 4, "device": "cpu", "in_chans": 3, "epochs": 1}
    for kind in ("parquet", "hub"):
        run = finetune(FinetuneOptions(data=sets[kind], output=str(tmp_path / kind), **about))
        assert run.images == (12, 3)
    names = json.loads((tmp_path / "hub/class_indices.json").read_text())
    assert names == {"0": "blue", "1": "green", "2": "red"}

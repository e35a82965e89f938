"""Runs on images of more than 8 bits: every level reaches the network, and what is no data changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from convnextv2.data import build_pretrain_dataset
from convnextv2.data.augmentation import BandAugmentation
from convnextv2.data.batches import Samples
from convnextv2.data.decoding import Wanted
from convnextv2.data.loading import make_loader
from convnextv2.data.reading import keep_no_data
from convnextv2.training import FinetuneOptions, PretrainOptions, finetune, pretrain
from convnextv2.weights.checkpoint import load_checkpoint

TINY: dict[str, Any] = {
    "depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24), "patch_size": 8, "img_size": 32, "workers": 0, "epochs": 2,
    "batch_size": 4, "device": "cpu", "tracker": "none", "warmup_epochs": 0.0, "compile": "none", "precision": "no",
}  # fmt: skip
NO_DATA = 65535


def scenes(root: Path, hole: int = NO_DATA, count: int = 8, bands: int = 6) -> Path:
    """Two classes of scenes of 48×40 pixels, 12 bits, of which some pixels have no data: they hold ``hole``."""
    rng = np.random.default_rng(0)
    for number in range(count):
        kind = number % 2
        values = rng.integers(0, 2000, (48, 40, bands)) + 2000 * kind * (np.arange(bands) % 2)
        missing = rng.random((48, 40, bands)) < 0.1
        missing[:20, :20] |= number == 3
        folder = root / ("dry", "wet")[kind]
        folder.mkdir(parents=True, exist_ok=True)
        stored = np.where(missing, hole, values).astype(np.uint16)
        tag = [(42113, "s", 0, str(hole), True)]
        tifffile.imwrite(
            folder / f"{number}.tif", stored, photometric="minisblack", planarconfig="contig", extratags=tag
        )
    return root


@pytest.mark.parametrize("crop", ["native", "area"])
def test_every_level_reaches_the_network(crop, tmp_path):
    values = np.random.default_rng(0).permutation(96 * 96).reshape(96, 96, 1) % 4096
    for number in range(2):
        stored = np.concatenate([values, values[::-1]], -1).astype(np.uint16)
        tifffile.imwrite(tmp_path / f"{number}.tif", stored, photometric="minisblack", planarconfig="contig")
    still = BandAugmentation(still=True)
    images = build_pretrain_dataset(tmp_path, (96, 96), 2, augmentation=still, wanted=Wanted(crop=crop))
    samples = Samples(images)
    batch = next(iter(make_loader(samples, 2, 0)))
    assert batch.dtype == (torch.uint16 if crop == "native" else torch.float32)
    floats = samples.finish(batch)
    assert floats.dtype == torch.float32 and floats.shape == (2, 2, 96, 96)
    assert all(len(floats[0, band].unique()) == 4096 for band in range(2))
    back = floats[0].permute(1, 2, 0).double().numpy() * images.std + images.mean
    np.testing.assert_allclose(back, stored, atol=1e-3)


def test_batches_have_nan_where_there_is_no_data_only_if_they_are_to(tmp_path):
    images = build_pretrain_dataset(scenes(tmp_path), (32, 32), 6, wanted=Wanted(crop="native"))
    samples = Samples(images)
    plain = samples.finish(next(iter(make_loader(samples, 8, 0))))
    assert plain.isfinite().all() and (plain == 0).float().mean() > 0.05
    assert keep_no_data(images)
    kept = samples.finish(next(iter(make_loader(samples, 8, 0))))
    torch.testing.assert_close(kept.nan_to_num(0.0), plain, rtol=0, atol=0)
    assert kept.isnan().float().mean() > 0.05


def test_what_is_no_data_changes_nothing(tmp_path):
    results = [
        pretrain(PretrainOptions(data=scenes(tmp_path / f"{hole}"), output=tmp_path / f"run{hole}", in_chans=6, **TINY))
        for hole in (NO_DATA, 60_000)
    ]
    first, second = ([row["loss"] for row in result.metrics] for result in results)
    assert first == second
    weights = [load_checkpoint(result.folder) for result in results]
    assert weights[0].metadata["mean"] == weights[1].metadata["mean"]
    assert 900 < min(weights[0].metadata["mean"]) < max(weights[0].metadata["mean"]) < 2200
    for name, tensor in weights[0].state_dict.items():
        assert torch.equal(tensor, weights[1].state_dict[name]), name


def test_from_pretraining_to_prediction(tmp_path, script):
    data = scenes(tmp_path / "data", count=12)
    plain = {name: value for name, value in TINY.items() if name not in ("depths", "dims")}
    common = [item for name, value in plain.items() for item in (f"--{name.replace('_', '-')}", value)]
    common += ["--depths", *TINY["depths"], "--dims", *TINY["dims"]]
    done = script(
        "pretrain", "--data", data, "--output", tmp_path / "pre", "--in-chans", 6, "--crop", "native", *common
    )
    assert done.status == 0, done.err
    metadata = load_checkpoint(tmp_path / "pre").metadata
    assert metadata["pixels"] == "native" and metadata["crop"] == "native"
    ranges = np.array(metadata["value_ranges"])
    assert (ranges[:, 0] < 100).all() and (ranges[:, 1] < 4096).all()

    done = script("convert_sparse_to_dense", tmp_path / "pre", tmp_path / "dense.safetensors")
    assert done.status == 0, done.err
    common = ["--data", data, "--output", tmp_path / "fine", "--init", tmp_path / "dense.safetensors", "--workers", 0]
    common += ["--epochs", 12, "--batch-size", 4, "--device", "cpu", "--tracker", "none", "--lr", 0.003]
    done = script("finetune", *common)
    assert done.status == 0, done.err
    fine = load_checkpoint(tmp_path / "fine").metadata
    assert (fine["mean"], fine["pixels"], fine["crop"]) == (metadata["mean"], "native", "native")

    done = script(
        "model_card", tmp_path / "pre", "--images", "scenes", "--licence", "CC0", "--output", tmp_path / "card.md"
    )
    assert done.status == 0, done.err
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "in the units of their files" in card and "\nfcmae finetune" in card

    (data / "broken.tif").write_bytes(b"II*\0")
    done = script("predict", tmp_path / "fine", data, "--output", tmp_path / "table.csv", "--device", "cpu")
    assert done.status == 0 and "12 images classified, 1 unreadable" in done.out, done.err
    done = script("evaluate", "knn", tmp_path / "fine", data, "--device", "cpu", "--k", 1)
    assert done.status == 0, done.err
    pictures = ["--output", tmp_path / "a.png", "--tiff", tmp_path / "back", "--device", "cpu", "--max-images", 2]
    done = script("visualize", tmp_path / "pre", data / "dry", *pictures)
    assert done.status == 0, done.err
    written = sorted((tmp_path / "back").iterdir())
    first, original = tifffile.imread(written[0]), tifffile.imread(data / "dry" / "0.tif")
    assert first.dtype == np.uint16 and first.shape == (32, 32, 6) and len(written) == 2
    middle = original[8:40, 4:36]
    same = (first == middle)[middle != NO_DATA]
    assert 0.25 < same.mean() < 0.5, "visible patches, 40 of 100, are as they were"


def test_a_resumed_run_reads_as_before(tmp_path):
    data = scenes(tmp_path / "data")
    how = {**TINY, "data": data, "in_chans": 6, "output": tmp_path / "run", "bands": "6,5,4,3,2,1"}
    how["augment"] = "satellite"
    whole = pretrain(PretrainOptions(**{**how, "output": tmp_path / "whole"}))
    with pytest.raises(KeyboardInterrupt):
        pretrain(PretrainOptions(**how), on_loss=stop_at(3))
    resumed = pretrain(PretrainOptions(**how, resume=True))
    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in whole.metrics]
    assert load_checkpoint(resumed.folder).metadata["bands"] == [6, 5, 4, 3, 2, 1]


def test_photographs_pretrained_on_are_no_reason_to_lose_bits(image_folder, tmp_path):
    photos = image_folder({"red": 4, "green": 4})
    before = pretrain(PretrainOptions(data=photos, output=tmp_path / "pre", **TINY))
    assert "pixels" not in load_checkpoint(before.folder).metadata
    options = {name: value for name, value in TINY.items() if name not in ("depths", "dims", "img_size", "patch_size")}
    deep = scenes(tmp_path / "deep", bands=3)
    result = finetune(FinetuneOptions(data=deep, output=tmp_path / "fine", init=before.folder, **options))
    metadata = load_checkpoint(result.folder).metadata
    assert metadata["pixels"] == "native" and min(metadata["mean"]) > 500


WRONG = [
    ({"bands": "1,2"}, r"`bands` 1,2 are 2, and `in_chans` is 6"),
    ({"bands": "a"}, r"`bands` are numbers from 1 on"),
    ({"pixels": "photo", "turns": True}, r"`turns` is of `pixels` native"),
    ({"pixels": "photo", "augment": "none"}, r"`augment` is of `pixels` native"),
    ({"augment": "none", "turns": True}, r"`augment` none is no change, and `turns` one"),
    ({"brightness": -1.0}, r"`brightness` must be"),
    ({"vflip": 2.0}, r"`vflip` must be"),
    ({"value_range": (5.0, 5.0)}, r"`value_range` must be"),
    ({"cache": "cache"}, r"`cache` is for|`cache` keeps 8 bits"),
    ({"data": "digits", "augment": "microscopy", "in_chans": 1}, r"`pixels` native is of image files"),
    ({"bands": 3}, r"`bands` must be str"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[message for _, message in WRONG])
def test_options_that_do_not_fit_are_told(wrong, message, tmp_path):
    options = {"data": scenes(tmp_path / "data", count=4), "in_chans": 6, "output": tmp_path / "run", **TINY, **wrong}
    if "cache" in wrong:
        options["cache"] = tmp_path / "cache"
    with pytest.raises((ValueError, TypeError), match=message):
        pretrain(PretrainOptions(**options))


def stop_at(step: int) -> Any:
    """For ``on_loss``: as Ctrl-C in that step."""

    def stop(number: int, *_: Any) -> None:
        if number == step:
            raise KeyboardInterrupt

    return stop

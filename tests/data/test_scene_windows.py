"""Windows as images: how scenes are covered, what is drawn, what is left out, how sets are parted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import zarr
from scene_helpers import NO_DATA, pixels, write_tiff

from convnextv2.data import DataError, build_finetune_datasets, build_predict_dataset, build_pretrain_dataset
from convnextv2.data.batches import Samples
from convnextv2.data.decoding import Wanted
from convnextv2.data.loading import EpochSampler, make_loader
from convnextv2.data.names import name_of
from convnextv2.data.reading import files_of
from convnextv2.data.scenes import _opened
from convnextv2.data.sources import FileSource
from convnextv2.data.whole import build_whole_dataset
from convnextv2.data.windows import MOSTLY_NO_DATA, Grid, data_share, windows_of

SIZE = 300, 420
WINDOW = 64, 64


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wanted(**more: Any) -> Wanted:
    return Wanted(**{"pixels": "native", "window": WINDOW, "crop": "native", **more})


def half_empty(path: Path, seed: int = 0, bands: int = 2) -> Path:
    """Without data in the left half but for a tenth of its pixels."""
    values = pixels(*SIZE, bands, seed)
    left = np.zeros(SIZE, bool)
    left[:, : SIZE[1] // 2] = np.random.default_rng(seed).random((SIZE[0], SIZE[1] // 2)) > 0.1
    values[left] = NO_DATA
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tiff(path, values, NO_DATA, tile=(32, 48))


@pytest.mark.parametrize("size", [(300, 420), (64, 64), (65, 1000), (40, 30), (1, 1)])
def test_a_grid_covers_a_scene_and_draws_in_it(size):
    grid, seen, drawn = Grid(size, WINDOW), np.zeros(size, int), set()
    rng = np.random.default_rng(0)
    for number in range(len(grid)):
        top, left, bottom, right = grid.box(number)
        seen[top:bottom, left:right] += 1
        for _ in range(20):
            box = grid.drawn(number, rng)
            drawn.add(box)
            assert box[0] >= 0 and box[1] >= 0 and box[2] <= size[0] and box[3] <= size[1]
            assert (box[2] - box[0], box[3] - box[1]) == tuple(np.minimum(size, WINDOW))
    assert seen.min() == 1
    assert len(grid) == -(-size[0] // 64) * -(-size[1] // 64)
    assert len(drawn) > 10 * len(grid) or min(size) <= 65


def test_every_place_is_drawn_as_often():
    """A grid of 4 windows on 24 places, 1,000 draws of each: the counts of the places are those of a fair die."""
    grid, rng = Grid((27, 4), (8, 4)), np.random.default_rng(0)
    counts = np.bincount([grid.drawn(n % 4, rng)[0] for n in range(8000)], minlength=20)
    assert len(counts) == 20
    assert ((counts - 400) ** 2 / 400).sum() < 43.8  # chi-squared of 19 degrees of freedom, one in a thousand


def test_samples_follow_from_seed_epoch_and_number(tmp_path):
    half_empty(tmp_path / "s" / "a.tif")
    half_empty(tmp_path / "s" / "b.tif", 1)
    build: Any = lambda seed: build_pretrain_dataset(tmp_path / "s", (32, 32), 2, seed=seed, wanted=wanted())  # noqa: E731

    def epoch(number: int, seed: int = 0, workers: int = 0, start: int = 0) -> np.ndarray:
        images = build(seed)
        images.set_epoch(number)
        sampler = EpochSampler(len(images), 0)
        sampler.epoch, sampler.start = number, start
        return torch.cat(list(make_loader(Samples(images), 4, workers, sampler))).float().numpy()

    first = epoch(1)
    np.testing.assert_array_equal(epoch(1, workers=2), first)
    np.testing.assert_array_equal(epoch(1, start=8), first[8:])
    assert not np.array_equal(epoch(2), first, equal_nan=True)
    assert not np.array_equal(epoch(1, seed=1), first, equal_nan=True)


def test_passes_through_an_epoch_draw_anew(tmp_path):
    half_empty(tmp_path / "s" / "a.tif")
    images = build_pretrain_dataset(tmp_path / "s", WINDOW, 2, wanted=wanted())
    samples = Samples(images, passes=2)
    assert not torch.equal(samples[0], samples[len(images)])


@pytest.mark.parametrize("kind", ["tif", "npy", "zarr"])
def test_windows_that_are_mostly_no_data_are_left_out(kind, tmp_path):
    path = half_empty(tmp_path / "a.tif")
    if kind != "tif":
        values = np.where(np.random.default_rng(0).random((*SIZE, 2)) > 0, pixels(*SIZE, 2), 0).astype("f4")
        values[:, : SIZE[1] // 2] = np.nan
        path = tmp_path / f"a.{kind}"
        if kind == "npy":
            np.save(path, values)
        else:
            zarr.create_array(path, shape=values.shape, chunks=(50, 50, 2), dtype="f4")[:] = values
    images = FileSource([path], 2, wanted())
    every, chosen = len(Grid(SIZE, WINDOW)), windows_of(images)[0]
    assert every == 35
    assert len(chosen) == 20
    shares = [data_share(chosen.draw(n, (0, epoch))) for n in range(len(chosen)) for epoch in range(10)]
    assert min(shares) >= 0.5
    exact = windows_of(images, exact=True)[0]
    assert len(exact) == every
    assert [exact.name(n) for n in (0, 34)] == [f"{path}[x=0,y=0]", f"{path}[x=356,y=236]"]


def test_where_there_is_data_is_known_at_the_next_start(tmp_path, cache, monkeypatch):
    images = FileSource([half_empty(tmp_path / "a.tif")], 2, wanted())
    found = windows_of(images)[0]
    (kept,) = (cache / "sparse-fcmae" / "scenes").iterdir()
    monkeypatch.setattr("convnextv2.data.windows._has_data", lambda *_: pytest.fail("looked again"))
    np.testing.assert_array_equal(windows_of(images)[0].chosen[0], found.chosen[0])
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    kept.write_bytes(b"damaged")
    np.testing.assert_array_equal(windows_of(images)[0].chosen[0], found.chosen[0])


def test_a_scene_without_data_is_skipped_and_a_set_of_them_refused(tmp_path):
    root = tmp_path / "s"
    half_empty(root / "a.tif")
    write_tiff(root / "b.tif", np.full((*SIZE, 2), NO_DATA, np.uint16), NO_DATA, tile=(32, 48))
    images = build_pretrain_dataset(root, (32, 32), 2, wanted=wanted())
    assert [(path.name, reason) for path, reason in images.skipped] == [("b.tif", "has no window that is mostly data")]
    (root / "a.tif").unlink()
    with pytest.raises(DataError, match=r"found none; first: .*b\.tif"):
        build_pretrain_dataset(root, (32, 32), 2, wanted=wanted())


def test_no_data_weighs_nothing_in_statistics(tmp_path):
    half_empty(tmp_path / "s" / "a.tif")
    images = build_pretrain_dataset(tmp_path / "s", (32, 32), 2, wanted=wanted())
    whole = pixels(*SIZE, 2)[:, SIZE[1] // 2 :].astype(float)
    np.testing.assert_allclose(images.mean, whole.mean((0, 1)), rtol=0.01)
    np.testing.assert_allclose(images.std, whole.std((0, 1)), rtol=0.01)


def test_a_damaged_tile_costs_the_windows_of_its_place(tmp_path):
    path = write_tiff(tmp_path / "s.tif", pixels(*SIZE, 2), tile=(32, 48))
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    data[offset : offset + count] = b"\xff" * count
    path.write_bytes(data)
    images = build_pretrain_dataset(path, WINDOW, 2, wanted=wanted(), mean=[0, 0], std=[1, 1])
    for epoch in range(3):
        images.set_epoch(epoch)
        for number in range(len(images)):
            images[number]
    assert images.replaced == [0]
    assert name_of(images.source, 0) == f"{path}[x=0,y=0]"


def test_a_random_split_is_one_of_scenes(tmp_path):
    for number in range(10):
        half_empty(tmp_path / "s" / "ab"[number % 2] / f"{number}.tif", number)
    train, val = build_finetune_datasets(tmp_path / "s", (32, 32), 2, wanted=wanted())
    scenes: Any = [{part.source.scenes[part.source.scene_of(n)] for n in range(len(part))} for part in (train, val)]
    assert [len(found) for found in scenes] == [8, 2]
    assert not scenes[0] & scenes[1]
    assert {path.parent.name for path in scenes[1]} == {"a", "b"}
    for part in (train, val):
        assert len(files_of(part.source)) == 10  # statistics are kept for the whole set
        for number, label in enumerate(part.labels):
            assert part.source.name(number).split("/")[-2] == "ab"[label]
    val.set_epoch(1)
    first = val[0][0]
    val.set_epoch(2)
    assert torch.equal(val[0][0], first)
    assert not torch.equal(train[0][0], [train.set_epoch(5), train[0][0]][1])


def test_one_scene_and_folders_of_zarr_are_sources(tmp_path):
    root = tmp_path / "s"
    for place in (root / "a.zarr", root / "b" / "c.zarr"):
        zarr.create_array(place, shape=(*SIZE, 2), chunks=(50, 50, 2), dtype="u2")[:] = pixels(*SIZE, 2)
    assert len(build_pretrain_dataset(root, (32, 32), 2, wanted=wanted())) == 70
    assert len(build_pretrain_dataset(root / "a.zarr", (32, 32), 2, wanted=wanted())) == 35
    assert len(build_predict_dataset([root / "a.zarr", root / "b"], WINDOW, 2, [0, 0], [1, 1], wanted())) == 70
    found = build_whole_dataset(root / "a.zarr", WINDOW, 2, [0, 0], [1, 1], wanted())
    assert found.names[1] == "a.zarr[x=59,y=0]"
    with pytest.raises(DataError, match=r"a\.zarr: one image, .*`window` reads a scene in parts"):
        build_pretrain_dataset(root / "a.zarr", (32, 32), 2)
    with pytest.raises(DataError, match="is a zarr array, which is read in parts: say `window`"):
        build_pretrain_dataset(root, (32, 32), 2)


def test_the_digits_have_no_windows():
    with pytest.raises(ValueError, match="`window` is of image files; leave it out"):
        build_pretrain_dataset("digits", (32, 32), 1, wanted=Wanted(window=WINDOW))


def test_what_is_predicted_is_the_whole_grid_but_for_what_is_no_data(tmp_path):
    path = half_empty(tmp_path / "a.tif")
    images: Any = build_predict_dataset([path], WINDOW, 2, [0, 0], [1, 1], wanted())
    reasons = [images[number][2] for number in range(len(images))]
    assert reasons.count(MOSTLY_NO_DATA) == 15
    number = len(images) - 1
    assert images.windows.box(number) == (236, 356, 300, 420)
    expected = pixels(*SIZE, 2)[236:, 356:].transpose(2, 0, 1)
    np.testing.assert_array_equal(images[number][0].numpy(), expected)


def test_windows_of_photographs_have_their_eight_bits(tmp_path):
    values = pixels(*SIZE, 3, dtype="u1")
    path = write_tiff(tmp_path / "a.tif", values, tile=(32, 48), photometric="rgb")
    how = wanted(pixels="photo", crop="area")
    images = build_predict_dataset([path], WINDOW, 3, [0, 0, 0], [1, 1, 1], how)
    np.testing.assert_allclose(images[0][0].numpy(), values[:64, :64].transpose(2, 0, 1) / 255, atol=1e-6)


def test_a_file_that_changes_its_size_is_told(tmp_path):
    source: Any = windows_of(FileSource([half_empty(tmp_path / "a.tif")], 2, wanted()))[0]
    write_tiff(tmp_path / "a.tif", pixels(200, 200, 2), tile=(32, 48))
    _opened.cache_clear()
    with pytest.raises(ValueError, match="another size"):
        source.load(0)

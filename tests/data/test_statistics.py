"""What is measured of values: against numpy on all of them at once."""

import json

import numpy as np
import pytest
from PIL import Image

from convnextv2.data import build_finetune_datasets, build_pretrain_dataset
from convnextv2.data.decoding import Wanted
from convnextv2.data.rasters import Raster
from convnextv2.data.statistics import FILE, BandStatistics, Moments, measure, stored_statistics

NATIVE = Wanted(pixels="native")


def rasters(dtype: str, count: int = 5) -> list[Raster]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        values = rng.gamma(2, 700, (31 + number, 27, 2)) * [1, 0.1]
        values = values if dtype != "int16" else values - 900
        valid = rng.random(values.shape) > 0.2 if number % 2 else None
        found.append(Raster(values.astype(dtype), valid))
    return found


def all_values(images: list[Raster], band: int) -> np.ndarray:
    parts = [image.values[..., band][... if image.valid is None else image.valid[..., band]] for image in images]
    return np.concatenate([part.ravel() for part in parts])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_numbers_are_those_of_all_values_at_once(dtype):
    images = rasters(dtype)
    found = BandStatistics(2)
    for image in images:
        found.add(image)
    for band, moments in enumerate(found.bands):
        values = all_values(images, band).astype(np.float64)
        mean, std = (numbers[band] for numbers in found.mean_std)
        np.testing.assert_allclose([mean, std], [values.mean(), values.std()], rtol=1e-12)
        assert (moments.low, moments.high, moments.count) == (values.min(), values.max(), len(values))
        total = sum(image.values[..., band].size for image in images)
        assert moments.no_data_share == pytest.approx(1 - len(values) / total)
        for share in (0.1, 5, 50, 99, 100):
            exact = np.sort(values)[max(0, int(np.ceil(share / 100 * len(values))) - 1)]
            np.testing.assert_allclose(moments.percentile(share), exact, rtol=0 if dtype != "float32" else 2**-7)
        counts, edges = moments.histogram()
        assert sum(counts) == len(values) and edges[0] == values.min() and edges[-1] == values.max()
        if dtype != "float32":
            np.testing.assert_array_equal(counts, np.histogram(values, len(counts))[0])


def test_parts_add_up_in_any_number_of_processes(tmp_path):
    for number, image in enumerate(rasters("uint16", 9)):
        np.save(tmp_path / f"{number}.npy", image.values)
    images = build_pretrain_dataset(tmp_path, (16, 16), 2).source
    alone = measure(images, range(9), 2, shares=4).about()
    assert measure(images, range(9), 2, shares=4, processes=3).about() == alone
    assert alone["images"] == 9 and alone["bands"][0]["no_data_share"] == 0


def test_types_that_differ_are_counted_as_floats():
    found, values = Moments(), np.arange(100)
    for kind in ("uint8", "int16", "float32"):
        found.add(values.astype(kind), 0)
    assert (found.count, found.mean, found.low, found.high) == (300, 49.5, 0, 99)
    assert found.percentile(50) == pytest.approx(49, rel=0.02)


@pytest.mark.parametrize("image", [np.zeros((4, 4, 1), "u2"), np.full((4, 4, 1), 0.1, "f4"), np.full((4, 4, 1), 7e4)])
def test_a_band_of_one_value_is_divided_by_one(image):
    found = BandStatistics(1)
    for _ in range(3):
        found.add(image)
    assert found.mean_std[1] == (1.0,)


def test_small_values_are_values():
    found, values = BandStatistics(1), np.random.default_rng(0).normal(0, 1e-12, (50, 50, 1)).astype("f4")
    found.add(values)
    np.testing.assert_allclose(found.mean_std[1], values.std(), rtol=1e-5)
    assert found.bands[0].percentile(99) > found.bands[0].percentile(1)


def folder(place, classes=("a", "b")):
    rng = np.random.default_rng(0)
    for label in classes:
        (place / label).mkdir(parents=True)
        for number in range(3):
            np.save(place / label / f"{number}.npy", rng.integers(0, 4096, (20, 20, 4)).astype("u2"))
    return place


@pytest.mark.pictures
def test_training_takes_what_is_kept_while_it_fits(tmp_path, script):
    data = folder(tmp_path / "data")
    done = script("compute_stats", data, "--output", tmp_path / "a.png", "--processes", 2)
    assert done.status == 0, done.err
    assert done.out.count("\n") == 6 and "6 of 6 images, in the units of the files" in done.out
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    kept = json.loads((data / FILE).read_text())
    values = np.stack([np.load(path) for path in sorted(data.rglob("*.npy"))]).reshape(-1, 4)
    np.testing.assert_allclose(kept["mean"], values.mean(0), rtol=1e-12)
    assert kept["bands"][1]["percentiles"]["50"] == np.sort(values[:, 1])[len(values) // 2 - 1]

    kept["mean"][0] = 1234.5
    (data / FILE).write_text(json.dumps(kept))
    assert build_pretrain_dataset(data, (16, 16), 4).mean[0] == 1234.5
    assert build_finetune_datasets(data, (16, 16), 4)[1].mean[0] == 1234.5
    assert build_pretrain_dataset(data, (16, 16), 1, wanted=Wanted(bands=(1,))).mean[0] != 1234.5
    np.save(data / "a" / "more.npy", np.zeros((20, 20, 4), "u2"))
    assert build_pretrain_dataset(data, (16, 16), 4).mean[0] != 1234.5
    for damage in ("{", "[]", '{"format": 1}', json.dumps({**kept, "std": [0, 0, 0, 0]})):
        (data / FILE).write_text(damage)
        if damage.startswith('{"format": 1, '):
            (data / "a" / "more.npy").unlink()
        with pytest.raises(ValueError, match=r"statistics\.json: .*; delete it"):
            build_pretrain_dataset(data, (16, 16), 4)


def test_a_sample_is_a_part_of_the_images(tmp_path, script):
    data = folder(tmp_path / "data")
    place = tmp_path / "found.json"
    how = ("--sample", 2, "--json", place, "--bands", "4,1", "--processes", 1, "--output", tmp_path / "a.png")
    done = script("compute_stats", data, *how)
    assert done.status == 0 and "2 of 6 images" in done.out, done.err
    first, last = (np.load(path) for path in (data / "a" / "0.npy", data / "b" / "2.npy"))
    np.testing.assert_allclose(json.loads(place.read_text())["mean"][0], np.stack([first, last])[..., 3].mean())
    assert not (data / FILE).exists()


WRONG = [
    (["nowhere"], "no such folder"),
    (["data", "--bands", "9"], "no usable one"),
    (["data", "--bands", "x"], "`bands`|--bands"),
    (["data", "--json", "missing/x/y.json", "--output", "data/a/0.npy"], "0.npy"),
    (["empty"], "found none whose bands"),
]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[message for _, message in WRONG])
def test_what_cannot_be_measured_is_told(arguments, message, tmp_path, script, monkeypatch):
    folder(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    done = script("compute_stats", *arguments)
    assert done.status == 2 and len(done.err.splitlines()) == 1, done.err
    assert any(part in done.err for part in message.split("|")), done.err


def test_what_is_kept_elsewhere_is_not_found(tmp_path):
    assert stored_statistics(tmp_path, NATIVE, 1, []) is None


@pytest.mark.pictures
def test_statistics_take_no_other_file_s_place(tmp_path, script):
    (tmp_path / "set").mkdir()
    Image.fromarray(np.full((9, 9), 700, np.uint16)).save(tmp_path / "set" / "a.png")
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    how = "--processes", 1, "--output", tmp_path / "s.png", "--json"
    for place in (tmp_path / "notes.json", tmp_path / "set" / "a.png"):
        before = place.read_bytes()
        assert script("compute_stats", tmp_path / "set", *how, place).status == 2
        assert place.read_bytes() == before
    for _ in range(2):  # an earlier result is replaced
        done = script("compute_stats", tmp_path / "set", *how, tmp_path / "new.json")
        assert done.status == 0, done.err

"""Changes of native images: what each part does to values, places and no-data, and that a seed decides them."""

import numpy as np
import pytest
import torch

from convnextv2.data.augmentation import PRESETS, BandAugmentation
from convnextv2.data.native_transforms import NativeTransform, resized
from convnextv2.data.rasters import Raster
from convnextv2.data.transforms import image_transform, sample_seed
from convnextv2.training import FinetuneOptions, PretrainOptions

BANDS = 7
MEAN, STD = tuple(float(1000 + 100 * band) for band in range(BANDS)), tuple(float(50 + band) for band in range(BANDS))


def raster(side: int = 32, holes: bool = False) -> Raster:
    rng = np.random.default_rng(0)
    values = (rng.normal(0, 1, (side, side, BANDS)) * STD + MEAN).round().astype(np.uint16)
    return Raster(values, rng.random(values.shape) > 0.1 if holes else None)


def transform(crop: str = "native", size: int = 32, ranges=None, **parts: object) -> NativeTransform:
    wish = {"crop_scale": (0.2, 1.0), "hflip": 0.0, **parts}
    return NativeTransform((size, size), (MEAN, STD), crop, BandAugmentation(**wish), ranges)


def drawn(how: NativeTransform, image: Raster, number: int, epoch: int = 0) -> torch.Tensor:
    with sample_seed(0, epoch, number):
        return how.in_units(image)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bands", [1, 3, 12])
def test_a_seed_decides_whatever_the_bands(preset, bands):
    parts = {name: value for name, value in PRESETS[preset].items() if name != "crop"}
    statistics, wish = ((900.0,) * bands, (80.0,) * bands), BandAugmentation((0.2, 1.0), 0.5, **parts)
    how = NativeTransform((16, 24), statistics, PRESETS[preset]["crop"], wish)
    values = np.random.default_rng(0).integers(700, 1100, (40, 50, bands)).astype(np.int16)
    found = [drawn(how, Raster(values), 3, epoch) for epoch in (0, 0, 1, 2)]
    assert torch.equal(found[0], found[1]) and found[0].shape == (bands, 16, 24)
    assert torch.equal(found[0], found[2]) == (preset == "none")
    assert torch.equal(found[2], found[3]) == (preset == "none")


def test_crops_at_native_scale_keep_values_and_turn_as_a_whole():
    image, how = raster(), transform(hflip=0.5, vflip=0.5, turns=True)
    whole = image.values.transpose(2, 0, 1).astype(np.float32)
    all_ways = [np.rot90(side, turns, (1, 2)) for side in (whole, whole[:, :, ::-1]) for turns in range(4)]
    seen = set()
    for number in range(64):
        found = drawn(how, image, number).numpy()
        ways = [way for way, one in enumerate(all_ways) if np.array_equal(one, found)]
        assert len(ways) == 1
        seen |= set(ways)
    assert seen == set(range(8))
    with sample_seed(0, 0, 0):
        assert how.travelling(image).dtype == torch.uint16


def test_crops_lie_anywhere_and_beyond_a_small_image_is_no_data():
    image, small = raster(40), transform(size=8)
    corners = {tuple(drawn(small, image, number)[:, 0, 0].tolist()) for number in range(40)}
    assert len(corners) > 30
    found = drawn(transform(size=48), raster(20), 0)
    assert found.isfinite().sum() == BANDS * 20 * 20
    assert sorted(found[found.isfinite()].tolist()) == sorted(raster(20).values.ravel().tolist())


def test_brightness_and_contrast_are_in_units_of_the_band_and_within_its_range():
    image = raster(64)
    plain = drawn(transform(size=64), image, 0)
    for number in range(20):
        shift = drawn(transform(size=64, brightness=0.2), image, number) - plain
        assert (shift.std((1, 2)) < 1e-2).all() and len(shift.mean((1, 2)).unique()) == BANDS
        assert (shift.mean((1, 2)).abs() <= 0.2 * 4 * torch.tensor(STD) + 1e-3).all()
        factor = drawn(transform(size=64, contrast=0.5), image, number).std((1, 2)) / plain.std((1, 2))
        assert ((factor >= 0.5) & (factor <= 1.5)).all() and (factor - 1).abs().max() > 0.01
    ranges = [(mean - 10, mean + 20) for mean in MEAN]
    found = drawn(transform(size=64, brightness=1.0, ranges=ranges), image, 0)
    for band, (low, high) in enumerate(ranges):
        assert low <= found[band].min() and found[band].max() <= high


def test_noise_is_in_standard_deviations_of_the_band():
    image, plain = raster(64), drawn(transform(size=64), raster(64), 0)
    shares = [
        (drawn(transform(size=64, noise=0.5), image, n) - plain).std((1, 2)) / torch.tensor(STD) for n in range(20)
    ]
    every = torch.stack(shares)
    assert (every.amax(1) / every.amin(1) < 1.2).all(), "the same share in every band"
    assert 0.35 < every.max() < 0.52 and every.min() < 0.1


def test_a_band_at_least_is_kept_and_dropped_ones_are_their_mean():
    counts = []
    for number in range(30):
        found = drawn(transform(band_dropout=0.5), raster(), number)
        dropped = [bool((found[band] == MEAN[band]).all()) for band in range(BANDS)]
        counts.append(sum(dropped))
    assert 2 < np.mean(counts) < 5
    all_but_one = drawn(transform(band_dropout=1.0), raster(), 0)
    assert sum(bool((all_but_one[band] == MEAN[band]).all()) for band in range(BANDS)) == BANDS - 1


@pytest.mark.parametrize(
    "parts", [{"brightness": 0.1}, {"contrast": 0.1}, {"noise": 0.1}, {"band_dropout": 0.5}], ids=str
)
def test_what_is_no_data_stays_so(parts):
    image = raster(holes=True)
    found = drawn(transform(**parts), image, 1)
    np.testing.assert_array_equal(found.isnan().numpy(), ~image.valid.transpose(2, 0, 1))
    whole = transform(**parts)
    with sample_seed(0, 0, 1):
        filled = whole(image)
    assert (filled[torch.from_numpy(~image.valid.transpose(2, 0, 1))] == 0).all()


@pytest.mark.parametrize("crop", ["area", "native"])
def test_what_lies_under_no_data_changes_nothing(crop):
    image, how = raster(48, holes=True), transform(crop, 20, hflip=0.5, noise=0.1)
    other = Raster(np.where(image.valid, image.values, 77).astype(np.uint16), image.valid)
    for number in range(5):
        first, second = (drawn(how, one, number) for one in (image, other))
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def test_holes_leave_no_traces_in_what_is_resized():
    values = torch.full((2, 60, 60), 300.0)
    scattered = torch.rand(60, 60, generator=torch.Generator().manual_seed(0)) < 0.2
    values[:, scattered] = float("nan")
    values[1, :, :30] = float("nan")
    found = resized(values, (13, 13))
    torch.testing.assert_close(found[0], torch.full((13, 13), 300.0))
    assert found[1, :, :6].isnan().all() and found[1, :, 7:].isfinite().all()
    assert resized(torch.full((1, 9, 9), float("nan")), (4, 4)).isnan().all()


def test_without_augmentation_it_is_what_other_arrays_become():
    rng = np.random.default_rng(0)
    for shape, size in (((300, 260, 5), (192, 160)), ((70, 50, 5), (32, 48)), ((20, 64, 5), (32, 32))):
        values = rng.random(shape).astype(np.float32)
        statistics = (0.5,) * 5, (0.25,) * 5
        expected = image_transform(size, *statistics)(values)
        found = NativeTransform(size, statistics, "area")(Raster(values))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_parts_come_from_the_choice_and_from_options():
    options = PretrainOptions(data="x", output="y", augment="microscopy", noise=0.0, turns=False)
    wish = options.augmentation()
    assert (wish.vflip, wish.turns, wish.contrast, wish.noise, wish.band_dropout) == (0.5, False, 0.2, 0.0, 0.0)
    assert options.wanted.native and options.wanted.crop == "native"
    options = FinetuneOptions(data="x", output="y", augment="satellite", crop="area", bands="4,3,2")
    assert (options.wanted.crop, options.wanted.bands, options.augmentation().band_dropout) == ("area", (4, 3, 2), 0.1)
    assert PretrainOptions(data="x", output="y").wanted.pixels == "auto"
    assert not PretrainOptions(data="x", output="y").augmentation().still


def test_steps_for_photographs_are_refused():
    with pytest.raises(ValueError, match="photographs of 8 bits"):
        transform(color_jitter=0.4)

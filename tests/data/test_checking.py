"""What is found wrong with sets of images, and what is not."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageEnhance

from convnextv2.data import checking
from convnextv2.data.checking import findings, groups, look, near_pairs, perceptual_hash


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture of its own: smooth random colours."""
    values = np.random.default_rng(seed).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for part in ("train", "val"):
        (root / part / "a").mkdir(parents=True)
    for seed in range(12):
        scene(seed).save(root / f"train/a/{seed:02d}.png")
    (root / "val/a/copy.png").write_bytes((root / "train/a/03.png").read_bytes())
    scene(5).resize((111, 83)).save(root / "val/a/small.jpg", quality=40)
    ImageEnhance.Brightness(scene(6)).enhance(0.6).save(root / "train/a/dark.png")
    for seed in (20, 21):
        scene(seed).save(root / f"val/a/{seed}.png")
    Image.new("RGB", (160, 120), "white").save(root / "val/a/white.png")
    Image.new("RGB", (160, 120), "black").save(root / "train/a/black.png")
    (root / "train/a/broken.png").write_bytes((root / "train/a/00.png").read_bytes()[:200])
    scene(30, (160, 9)).save(root / "train/a/strip.png")
    return root


@pytest.mark.pictures
def test_all_kinds_in_one_set(script: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    done = script("check_data", photos, "--output", tmp_path / "check.csv", "--picture", tmp_path / "check.png")
    assert done.status == 0, done.err
    rows = list(csv.reader((tmp_path / "check.csv").read_text().splitlines()))[1:]
    found = {(kind, *sorted(Path(file).name for file in files)): what for kind, what, *files in rows}
    assert found.pop(("unreadable", "broken.png"))
    assert found == {
        ("duplicate", "03.png", "copy.png"): "the same file, in train and val",
        ("near duplicate", "05.png", "small.jpg"): "nearly the same picture, in train and val",
        ("near duplicate", "06.png", "dark.png"): "nearly the same picture",
        ("blank", "white.png"): "shows one value alone",
        ("blank", "black.png"): "shows one value alone",
        ("odd size", "strip.png"): found["odd size", "strip.png"],
        ("odd size", "small.jpg"): "83×111 pixels, where 18 have 120×160 pixels",
    }
    assert "19 of 20 files are images that can be read" not in done.out
    assert "20 of 21 files are images that can be read" in done.out
    assert "picture of 3 pair(s)" in done.out
    with Image.open(tmp_path / "check.png") as drawn:
        assert drawn.height > drawn.width
    strict = script("check_data", photos, "--output", tmp_path / "check.csv", "--strict")
    assert (strict.status, strict.err.strip().splitlines()[-1].startswith("error: ")) == (2, True)


def test_bands_and_bits_other_than_most(tmp_path: Path) -> None:
    rng, planar = np.random.default_rng(0), {"planarconfig": "separate", "photometric": "minisblack"}
    for name, bands in (("0", 6), ("1", 6), ("2", 6), ("3", 6), ("four", 4)):
        tifffile.imwrite(tmp_path / f"{name}.tif", rng.integers(0, 4096, (bands, 40, 40), np.uint16), **planar)
    np.save(tmp_path / "five.npy", np.full((6, 40, 40), np.nan, np.float32))
    Image.fromarray(rng.integers(0, 255, (40, 40), np.uint8)).save(tmp_path / "gray.png")
    looks = [look(path) for path in sorted(tmp_path.iterdir())]
    found = {(one.kind, one.files[0].name): one.what for one in findings(looks, [""] * len(looks))}
    assert found == {
        ("blank", "five.npy"): "shows one value alone",
        ("other bands", "four.tif"): "4 band(s), where 5 have 6 band(s)",
        ("other bands", "gray.png"): "1 band(s), where 5 have 6 band(s)",
        ("other depth", "gray.png"): "8 bits, where 6 have more than 8 bits",
    }


def test_a_clean_set_has_no_findings(image_folder: Callable[..., Path], script: Callable[..., Any]) -> None:
    root = image_folder({"a": 3})
    for seed, path in enumerate(sorted(root.rglob("*.png"))):
        scene(seed).save(path)
    done = script("check_data", root, "--output", root.parent / "c.csv", "--strict", "--picture", root.parent / "c.png")
    assert (done.status, "no pair of images to draw" in done.out) == (0, True)
    assert (root.parent / "c.csv").read_text() == "kind,what,files\n"


@pytest.mark.parametrize(("name", "message"), [("none", "no such folder"), ("", "found none")])
def test_one_line_where_there_is_nothing(script: Callable[..., Any], tmp_path: Path, name: str, message: str) -> None:
    done = script("check_data", tmp_path / name, "--output", tmp_path / "check.csv")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert message in done.err
    assert not (tmp_path / "check.csv").exists()


def test_pairs_are_those_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**64, 60, np.uint64, endpoint=False)
    for number in range(30, 60):  # 0 to 11 bits from another
        turned = np.uint64(0)
        for place in rng.choice(64, number % 12, replace=False):
            turned |= np.uint64(1) << np.uint64(place)
        bits[number] = bits[number - 30] ^ turned
    expected = [
        (one, other)
        for one in range(60)
        for other in range(one + 1, 60)
        if (int(bits[one]) ^ int(bits[other])).bit_count() <= checking.NEAR_BITS
    ]
    pairs, more = near_pairs(bits)
    assert list(map(tuple, pairs.tolist())) == expected
    assert len(expected) >= 18
    assert not more
    assert near_pairs(np.empty(0, np.uint64))[0].shape == (0, 2)


def test_many_alike_are_bounded_and_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checking, "MOST_PAIRS", 100)
    pairs, more = near_pairs(np.zeros(50, np.uint64))
    assert more
    assert len(pairs) <= 100
    for number in range(12):
        scene(0).save(tmp_path / f"{number}.jpg", quality=50 + number)
    looks = [look(path) for path in sorted(tmp_path.iterdir())]
    assert any("more pairs than were compared" in one.what for one in findings(looks, [""] * 12))


def test_groups_and_the_hash() -> None:
    assert groups(6, [(0, 3), (3, 5), (1, 2)]) == [[0, 3, 5], [1, 2]]
    values = np.asarray(scene(3).convert("L").resize((32, 32)), float)
    assert perceptual_hash(values) == perceptual_hash(0.25 * values + 40)
    assert (perceptual_hash(values) ^ perceptual_hash(values[::-1])).bit_count() > 16


def test_arrays_of_bytes_are_images(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8))
    found = look(tmp_path / "a.npy")
    assert (found.reason, found.size) == ("", (40, 30))

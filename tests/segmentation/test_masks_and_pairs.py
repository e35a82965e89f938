"""Masks and what their values mean; folders of pairs; images and masks changed alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shapes import drawn, make_pairs, make_parts

from convnextv2.data.decoding import USUAL, UnreadableImageError, Wanted
from convnextv2.data.sources import DataError
from convnextv2.segmentation.datasets import build_segmentation_datasets
from convnextv2.segmentation.masks import IGNORED, Classes, inferred_classes, palette, read_classes, read_mask
from convnextv2.segmentation.pairs import Pair, find_files, load_whole
from convnextv2.segmentation.transforms import PairAugmentation, TrainTransform

THREE = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16", "I", "tiff"])
def test_masks_of_every_mode_are_their_values(mode: str, tmp_path: Path) -> None:
    values = np.array([[0, 1, 1], [1, 0, 1]])
    values = values if mode == "1" else values * 200 if mode in ("I;16", "I") else values * 7
    path = tmp_path / ("m.tif" if mode in ("tiff", "I") else "m.png")
    if mode in ("I;16", "I"):
        values = values * 200
        picture = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    elif mode == "1":
        picture = Image.fromarray(values.astype(bool))
    else:
        picture = Image.fromarray(values.astype(np.uint8))
    if mode == "P":
        picture.putpalette([255 - number // 3 for number in range(768)])
    picture.save(path)
    assert read_mask(path, USUAL).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [("m.png", "RGB", "mode RGB; expected a gray"), ("m.jpg", "L", "a mask in JPEG"), ("m.tif", "F", "mode F")],
)
def test_what_is_no_mask_is_told(name: str, mode: str, words: str, tmp_path: Path) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / name)
    with pytest.raises(UnreadableImageError, match=words):
        read_mask(tmp_path / name, USUAL)


def test_values_become_numbers_and_come_back() -> None:
    classes = Classes(("a", "b", "c"), (3, 0, 60000), 7)
    mask = np.array([[3, 0, 60000, 7]], np.uint16)
    numbers = classes.encode(mask, Path("m.png"))
    assert numbers.tolist() == [[0, 1, 2, IGNORED]]
    assert classes.decode(numbers[:, :3]).tolist() == mask[:, :3].tolist()
    with pytest.raises(DataError, match=r"m\.png: holds the value 5 in row 1, column 0; the classes have 3, 0, 60000"):
        classes.encode(np.array([[3, 0], [5, 7]]), Path("m.png"))
    assert Classes(("a", "b"), (0, 255), None).encode(np.array([255, 0]), Path("m")).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "ignored", "expected"),
    [
        ({0, 1, 2, 255}, 255, (0, 1, 2)),
        ({0, 2}, 255, (0, 1, 2)),
        ({0, 1, 2}, 0, (1, 2)),
        ({0, 1, 2}, None, (0, 1, 2)),
        ({0, 255}, 255, "masks hold 0 and 255 alone, and 255 is `ignore_index`: set that to -1"),
        ({0, 255}, None, "name the classes and their values in classes.json"),
        ({0, 100, 200}, 255, r"3 values up to 200 \(0, 100, 200\); name the classes"),
        ({4}, 255, "the value 4 alone"),
        (set(), 255, "the value none alone"),
    ],
)
def test_classes_are_inferred_where_that_makes_sense(values: set[int], ignored: int | None, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            inferred_classes(values, ignored)
        return
    found = inferred_classes(values, ignored)
    assert (found.values, found.names) == (expected, tuple(map(str, expected)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('["sky", "road"]', (("sky", "road"), (0, 1))),
        ('{"road": 255, "sky": 0}', (("sky", "road"), (0, 255))),
        ('{"0": "sky", "9": "road"}', (("sky", "road"), (0, 9))),
        ('{"0": "sky", "1": "sky"}', "the same name"),
        ('["sky", 1]', "expected"),
        ('{"sky": true}', "expected"),
        ('{"sky": "0"}', "expected"),
        ("{sky", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("3", "expected"),
    ],
)
def test_names_of_classes_are_read(text: str, expected: Any, tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(text)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read_classes(tmp_path / "classes.json")
    else:
        assert read_classes(tmp_path / "classes.json") == expected


def test_the_palette_is_that_of_pascal_voc() -> None:
    expected = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128], [0, 128, 128]]
    assert palette(7).tolist() == expected
    assert palette(16)[15].tolist() == [192, 128, 128]
    assert len({tuple(colour) for colour in palette(255).tolist()}) == 255


def spoilt(root: Path, how: str) -> str:
    """What is wrong with one file of a folder of pairs, which the message names."""
    images, masks = root / "images", root / "masks"
    if how == "no mask":
        (masks / "002.png").unlink()
        return r"images/002\.png: has no mask; expected .*masks/002\.png"
    if how == "no image":
        (images / "001.png").unlink()
        return r"masks/001\.png: has no image; expected .*images/001\.png"
    if how == "size":
        Image.new("L", (48, 41)).save(masks / "003.png")
        return r"masks/003\.png: has 48×41 pixels, its image .*images/003\.png 48×40"
    if how == "value":
        Image.fromarray(np.full((40, 48), 9, np.uint8)).save(masks / "001.png")
        return r"masks/001\.png: holds the value 9 in row 0, column 0; the classes have 0, 1, 2, and 255 is ignored"
    if how == "two":
        Image.new("RGB", (48, 40)).save(images / "001.jpg")
        return r"images/001\.png: has the same name as 001\.jpg"
    if how == "folder":
        (root / "masks").rename(root / "labels")
        return r"masks: no such folder; expected DATA/images/NAME\.jpg"
    for path in images.iterdir():
        path.write_bytes(b"no image")
    return r"looked for images with masks and found no usable pair; first of 6 skipped: .*000\.png"


@pytest.mark.parametrize("how", ["no mask", "no image", "size", "value", "two", "folder", "damaged"])
def test_one_line_names_the_file_that_is_wrong(how: str, tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "set")
    words = spoilt(root, how)
    with pytest.raises(DataError, match=words) as error:
        build_segmentation_datasets(root, (32, 32), names="ground,disc,square", val_fraction=0.34)
    assert "\n" not in str(error.value)


def test_what_cannot_be_read_is_left_out_and_told(tmp_path: Path) -> None:
    root = make_parts(tmp_path / "set", (5, 2))
    train = root / "train"
    (train / "images" / "Thumbs.db").write_bytes(b"x")
    (train / "images" / "000.png").write_bytes((train / "images" / "000.png").read_bytes()[:100])
    (train / "masks" / "001.png").write_bytes((train / "masks" / "001.png").read_bytes()[:60])
    Image.new("RGB", (48, 40)).save(train / "masks" / "002.png")
    training, validation, classes = build_segmentation_datasets(root, (32, 32))
    assert (len(training), len(validation), classes.names) == (2, 2, ("0", "1", "2"))
    assert {path.name for path, _ in training.skipped} == {"Thumbs.db", "000.png", "001.png", "002.png"}
    assert any("its mask" in reason and "mode RGB" in reason for _, reason in training.skipped)
    image, mask = training[0]
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((3, 32, 32), torch.float32, (32, 32), torch.uint8)


def test_folders_without_parts_are_split_by_the_seed(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "set", 10)
    (root / "classes.json").write_text(json.dumps(["ground", "disc", "square"]))
    parts = [build_segmentation_datasets(root, (32, 32), seed=seed, val_fraction=0.3)[:2] for seed in (0, 0, 1)]
    names = [[{path.name for path in part.source.paths} for part in pair] for pair in parts]
    assert [len(part) for part in names[0]] == [7, 3]
    assert not names[0][0] & names[0][1]
    assert names[0] == names[1] != names[2]
    assert parts[0][0].classes == ["ground", "disc", "square"]


def test_files_in_folders_of_folders_are_matched_by_their_place(tmp_path: Path) -> None:
    for side in ("left", "right"):
        make_pairs(tmp_path / side, 1, seed=len(side))
        for name in ("images", "masks"):
            (tmp_path / "set" / name / side).mkdir(parents=True)
            (tmp_path / side / name / "000.png").rename(tmp_path / "set" / name / side / "a.b.png")
    found = find_files(tmp_path / "set", 3, USUAL)
    assert (
        [path.parent.name for path in found.images] == [path.parent.name for path in found.masks] == ["left", "right"]
    )


def test_an_image_is_not_read_reduced(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg")
    assert load_whole(tmp_path / "a.jpg", 3, Wanted(max_pixels=4096)).size == (64, 64)
    with pytest.raises(UnreadableImageError, match="64×64 pixels, more than `max_pixels` 4000"):
        load_whole(tmp_path / "a.jpg", 3, Wanted(max_pixels=4000))


def transform(size: tuple[int, int] = (32, 48), **changes: Any) -> TrainTransform:
    return TrainTransform(size, THREE, PairAugmentation(**changes))


def told_by_colour(images: torch.Tensor) -> torch.Tensor:
    """Classes that were painted as brightness: 0, 100, 200."""
    return ((images.mean(0) * 0.5 + 0.5) * 255 / 100).round()


def test_image_and_mask_are_changed_alike() -> None:
    """Images of which each pixel says its class: so must each of the result, but on edges that were resized."""
    _, mask = drawn(np.random.default_rng(0), 90, 70)
    image = Image.fromarray(np.repeat((mask * 100)[..., None], 3, -1))
    seen, filled = set[str](), 0
    for seed in range(24):
        torch.manual_seed(seed)
        found, classes = transform(hflip=0.5, vflip=0.5)(Pair(image, mask))
        assert (found.shape, classes.shape) == ((3, 32, 48), (32, 48))
        known = classes != IGNORED
        agree = (told_by_colour(found) == classes)[known].float().mean()
        assert agree > 0.9
        assert found[:, ~known].abs().sum() == 0  # the mean colour
        filled += int((~known).sum())
        seen.add(str(classes.tolist()))
    assert len(seen) == 24
    assert filled > 0


def test_without_changes_a_pair_is_itself_in_a_frame() -> None:
    pixels, mask = drawn(np.random.default_rng(1), 30, 40)
    still = {"scale": (1.0, 1.0), "hflip": 0.0}
    image, classes = transform((30, 40), **still)(Pair(Image.fromarray(pixels), mask))
    assert torch.equal(classes, torch.from_numpy(mask))
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    torch.testing.assert_close(image, (expected - 0.5) / 0.5)
    image, classes = transform((64, 64), **still)(Pair(Image.fromarray(pixels), mask))
    assert int((classes != IGNORED).sum()) == 1200
    rows, columns = (classes != IGNORED).nonzero().amin(0).tolist()
    assert torch.equal(classes[rows : rows + 30, columns : columns + 40], torch.from_numpy(mask))


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (2.0, 2.0), (0.01, 0.01), (50.0, 50.0)])
def test_scales_are_of_the_images_own_pixels(low: float, high: float) -> None:
    """A square of 20 pixels has 20 · factor in the crop."""
    mask = np.zeros((200, 200), np.uint8)
    mask[90:110, 90:110] = 1
    image = Image.fromarray(np.repeat((mask * 100)[..., None], 3, -1))
    _, classes = transform((400, 400), scale=(low, high), hflip=0.0)(Pair(image, mask))
    if low in (0.5, 2.0):
        assert int((classes == 1).sum()) == (20 * low) ** 2
        assert int((classes != IGNORED).sum()) == (200 * low) ** 2
    assert classes.shape == (400, 400)


def test_other_channels_are_changed_too(tmp_path: Path) -> None:
    for name, count in (("train", 4), ("val", 1)):
        make_pairs(tmp_path / name, count)
        for path in (tmp_path / name / "images").iterdir():
            pixels = np.random.default_rng(0).normal(size=(40, 48, 5)).astype(np.float32)
            pixels[:10, :10] = np.nan  # no data
            np.save(path.with_suffix(".npy"), pixels)
            path.unlink()
    training, validation, _ = build_segmentation_datasets(tmp_path, (32, 32), 5)
    assert training[0][0].shape == (5, 32, 32)
    assert all(training[number][0].isfinite().all() for number in range(4))
    assert validation[0][0].dtype == torch.float32
    assert validation[0][0][:10, :10].isnan().all()
    assert training.std == pytest.approx([1.0] * 5, abs=0.1)  # measured
    with pytest.raises(ValueError, match="`color_jitter` knows images of 1 or 3 channels, not 5"):
        TrainTransform((8, 8), ((0.0,) * 5, (1.0,) * 5), PairAugmentation(color_jitter=0.4))


def test_colours_of_native_images_are_not_jittered(tmp_path: Path) -> None:
    root = make_parts(tmp_path / "set", (4, 1))
    for path in root.rglob("images/*"):
        values = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 9
        Image.fromarray(values).save(path.with_suffix(".tif"))
        path.unlink()
    how: dict[str, Any] = {"augmentation": PairAugmentation(color_jitter=0.4)}
    with pytest.raises(ValueError, match="`color_jitter` is for photographs of 8 bits"):
        build_segmentation_datasets(root, (32, 32), 1, **how)
    training, _, _ = build_segmentation_datasets(root, (32, 32), 1)
    assert training[0][0].std() > 0.1


def test_gray_images_have_one_channel(tmp_path: Path) -> None:
    root = make_parts(tmp_path / "set", (4, 1))
    training, validation, _ = build_segmentation_datasets(
        root, (32, 32), 1, augmentation=PairAugmentation(color_jitter=0.4)
    )
    assert training[0][0].shape == (1, 32, 32)
    assert validation[0][0].shape == (40, 48, 1)
    assert training.examples(2).shape == (2, 1, 32, 32)


def test_arrays_of_bytes_are_images(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((40, 30, 3), np.uint8))
    assert load_whole(tmp_path / "a.npy", 3, USUAL).size == (30, 40)

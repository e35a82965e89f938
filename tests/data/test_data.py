import os
import pickle
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from convnextv2.data import folders
from convnextv2.data.build import build_finetune_datasets, build_predict_dataset, build_pretrain_dataset
from convnextv2.data.digits import export_digits
from convnextv2.data.folders import scan_images
from convnextv2.data.images import UnreadableImageError, load_image, to_bytes
from convnextv2.data.sources import DataError, stratified_split
from convnextv2.data.transforms import (
    Augmentation,
    eval_transform,
    preprocessing_from_metadata,
    sample_seed,
    train_transform,
)

Folder = Callable[..., Path]


def pixel(path: Path, channels: int = 3) -> tuple[int, ...]:
    image = load_image(path, channels)
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


# Conversions


def test_gray_black_and_white_and_palette(tmp_path: Path) -> None:
    assert pixel(save(Image.new("L", (4, 3), 77), tmp_path / "l.png")) == (77, 77, 77)
    assert pixel(save(Image.new("1", (4, 3), 1), tmp_path / "1.png")) == (255, 255, 255)
    palette = Image.new("RGB", (4, 3), (200, 10, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixel(save(palette, tmp_path / "p.png")) == (200, 10, 30)


def test_transparency_shows_a_white_page(tmp_path: Path) -> None:
    assert pixel(save(Image.new("RGBA", (4, 3), (10, 20, 30, 0)), tmp_path / "rgba.png")) == (255, 255, 255)
    half = pixel(save(Image.new("RGBA", (4, 3), (0, 0, 0, 128)), tmp_path / "half.png"))
    assert half == pytest.approx((127, 127, 127), abs=1)
    assert pixel(save(Image.new("LA", (4, 3), (10, 0)), tmp_path / "la.png")) == (255, 255, 255)
    palette = Image.new("P", (4, 3), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    assert pixel(save(palette, tmp_path / "p.png", transparency=0)) == (255, 255, 255)
    palette.putpixel((0, 0), 1)
    assert pixel(save(palette, tmp_path / "p2.png", transparency=0)) == (200, 0, 0)
    assert pixel(save(Image.new("RGB", (4, 3), (1, 2, 3)), tmp_path / "key.png", transparency=(1, 2, 3))) == (255,) * 3


def test_cmyk_and_ycbcr(tmp_path: Path) -> None:
    red = pixel(save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "c.jpg", quality=95))
    assert red[0] > 240
    assert max(red[1:]) < 15


@pytest.mark.parametrize("name", ["x.png", "x.tif", "big.tif", "x.pgm"])
def test_16_bits_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    values = np.full((3, 4), 32768, dtype=np.uint16)
    values[0, 0] = 257 * 100
    values[2, 3] = 65535
    if name == "x.pgm":
        (tmp_path / name).write_bytes(b"P5 4 3 65535\n" + values.astype(">u2").tobytes())
    elif name == "big.tif":
        save(Image.frombytes("I;16B", (4, 3), values.astype(">u2").tobytes()), tmp_path / name)
    else:
        save(Image.fromarray(values), tmp_path / name)
    image = np.asarray(load_image(tmp_path / name, 3))
    assert image[0, 0].tolist() == [100] * 3
    assert image[1, 1].tolist() == [128] * 3
    assert image[2, 3].tolist() == [255] * 3


def test_dark_16_bits_stay_dark(tmp_path: Path) -> None:
    assert pixel(save(Image.fromarray(np.full((3, 4), 257, np.uint16)), tmp_path / "x.png")) == (1, 1, 1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[0.0, 25700.0, 65535.0]], np.float32), [0, 100, 255]),
        (np.array([[-10.0, 0.0, 10.0]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 25700, 65535]], np.int32), [0, 100, 255]),
        (np.array([[5.0, 5.0, 5.0]], np.float32), [5, 5, 5]),
        (np.array([[False, True]]), [0, 255]),
        (np.array([[257, 65535]], ">u2"), [1, 255]),
    ],
)
def test_ranges_of_undeclared_types(values: np.ndarray, expected: list[int]) -> None:
    assert to_bytes(values).ravel().tolist() == expected


def test_float_tiff_and_nan(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    image = np.asarray(load_image(save(Image.fromarray(values), tmp_path / "f.tif"), 3))
    assert (image[0, 0, 0], image[2, 3, 0]) == (0, 255)
    values[1, 1] = np.nan
    save(Image.fromarray(values), tmp_path / "nan.tif")
    with pytest.raises(UnreadableImageError, match="NaN"):
        load_image(tmp_path / "nan.tif", 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(("orientation", "corner"), [(1, 0), (2, 1), (3, 3), (4, 2), (5, 0), (6, 2), (7, 3), (8, 1)])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int, corner: int) -> None:
    # Four corners, bright where numbered 0 … 3 = top left, top right, bottom left, bottom right of the stored image.
    # ``corner`` is the stored corner that must appear at the top left.
    stored = np.zeros((16, 32), np.uint8)
    for number, value in enumerate((0, 80, 160, 240)):
        row, column = divmod(number, 2)
        stored[8 * row : 8 * row + 8, 16 * column : 16 * column + 16] = value
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(stored).convert("RGB").save(path, exif=exif)
    image = load_image(path, 3)
    assert isinstance(image, Image.Image)
    assert image.size == ((16, 32) if orientation >= 5 else (32, 16))
    assert image.getpixel((3, 3))[0] == pytest.approx((0, 80, 160, 240)[corner], abs=6)


def test_one_channel_is_luminance(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (4, 3), (255, 0, 0)), tmp_path / "x.png")
    assert pixel(path, 1) == (76, 76, 76)


def test_arrays_of_other_channel_counts(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 5, dtype=np.uint16).reshape(2, 3, 5) * 1000
    np.save(tmp_path / "last.npy", values)
    np.save(tmp_path / "first.npy", np.moveaxis(values, -1, 0))
    pages = [Image.fromarray(np.ascontiguousarray(values[..., c])) for c in range(5)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    for name in ("last.npy", "first.npy", "pages.tif"):
        np.testing.assert_allclose(load_image(tmp_path / name, 5), values / 65535, rtol=1e-6)
    with pytest.raises(UnreadableImageError, match="expected 4 channels"):
        load_image(tmp_path / "last.npy", 4)
    with pytest.raises(UnreadableImageError, match="expected 4 channels"):
        load_image(tmp_path / "pages.tif", 4)
    four = save(Image.new("RGBA", (4, 3), (10, 20, 30, 40)), tmp_path / "four.png")
    np.testing.assert_allclose(load_image(four, 4)[0, 0], np.array([10, 20, 30, 40]) / 255, rtol=1e-6)
    np.save(tmp_path / "rgb.npy", np.full((2, 3, 3), 9, np.uint8))
    assert pixel(tmp_path / "rgb.npy") == (9, 9, 9)


# Scanning


def bad_files(folder: Path) -> dict[str, str]:
    """Unusable files, and a word of the reason for each."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8))
    for suffix in ("jpg", "png"):
        save(noise, folder / f"cut.{suffix}")
        content = (folder / f"cut.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    broken = bytearray((folder / "cut.png").read_bytes())
    broken[60:90] = bytes(30)
    (folder / "corrupt.png").write_bytes(broken)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    (folder / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00nonsense")
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    crc = zlib.crc32(header).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0d" + header + crc + bytes(4) + b"IDAT" + bytes(4)
    )
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "loop").symlink_to(folder)
    (folder / "self.png").symlink_to(folder / "self.png")
    os.mkfifo(folder / "pipe.png")
    return {
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "corrupt.png": "",
        "empty.jpg": "empty",
        "text.png": "not an image",
        "notes.txt": "not an image",
        "bad.npy": "npy",
        "objects.npy": "npy",
        "bomb.png": "bomb",
        "dangling.png": "broken link",
        "loop": "link",
        "self.png": "link",
        "pipe.png": "regular file",
    }


def test_scan_skips_and_explains(image_folder: Folder) -> None:
    root = image_folder({"": 2})
    expected = bad_files(root)
    listing = scan_images(root)
    assert [path.name for path in listing.paths] == ["000.png", "001.png"]
    reasons = {path.name: reason for path, reason in listing.skipped}
    assert reasons.keys() == expected.keys()
    for name, word in expected.items():
        assert word in reasons[name], (name, reasons[name])
        assert reasons[name].strip()


def test_scan_finds_everything_that_is_an_image(image_folder: Folder) -> None:
    root = image_folder({"": 1})
    image = Image.new("RGB", (4, 4), "red")
    (root / "deep" / "er").mkdir(parents=True)
    (root / "folder.jpg").mkdir()
    (root / ".hidden").mkdir()
    for name in ("a b.png", "日本 é.png", "deep/er/x.png", "folder.jpg/y.png", ".hidden/z.png", ".h.png"):
        save(image, root / name)
    save(image, root / "really_png.jpg", format="PNG")
    save(image, root / "nameless", format="PNG")
    found = {path.relative_to(root).as_posix() for path in scan_images(root).paths}
    assert found == {
        "000.png", "a b.png", "日本 é.png", "deep/er/x.png", "folder.jpg/y.png", "really_png.jpg", "nameless",
    }  # fmt: skip
    assert scan_images(root).labels is None


def test_scan_labels_and_sorts(image_folder: Folder) -> None:
    root = image_folder({"b": 2, "a": 1})
    (root / "none").mkdir()
    listing = scan_images(root)
    assert (listing.classes, listing.labels) == (["a", "b"], [0, 1, 1])
    assert listing.skipped == []
    save(Image.new("L", (3, 3)), root / "stray.png")
    labelled = scan_images(root, labelled=True)
    assert labelled.labels == [0, 1, 1]
    assert {path.name: reason for path, reason in labelled.skipped} == {
        "stray.png": "lies outside of the class folders",
        "none": "class folder without a usable image",
    }


def test_unreadable_folder_is_skipped(image_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder({"a": 1, "b": 1})
    scandir = os.scandir

    def denied(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", denied)
    listing = scan_images(root)
    assert len(listing.paths) == 1
    assert listing.skipped == [(root / "b", "Permission denied")]


def test_scan_errors_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        scan_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="found no usable one"):
        scan_images(tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match=r"x\.txt \(not an image"):
        scan_images(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        scan_images(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="check must be"):
        scan_images(tmp_path, check="perhaps")


def test_large_folders_are_checked_by_header_and_repaired_on_load(
    image_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder({"": 4})
    content = (root / "001.png").read_bytes()
    (root / "001.png").write_bytes(content[:-200])
    (root / "nothing.png").write_bytes(b"")
    assert len(scan_images(root).paths) == 3
    monkeypatch.setattr(folders, "FULL_CHECK_BYTES", 10)
    dataset = build_pretrain_dataset(root, (32, 32), augmentation=Augmentation((1.0, 1.0), hflip=0))
    assert len(dataset) == 4
    assert [path.name for path, _ in dataset.skipped] == ["nothing.png"]
    assert dataset.replaced == []
    batches = list(DataLoader(dataset, batch_size=2, num_workers=2))
    assert dataset.replaced == [1]  # seen in a worker, counted here
    assert sum(map(len, batches)) == 4
    torch.testing.assert_close(dataset.plain_transform(dataset.source.load(2)), dataset.examples(4)[1])


def test_no_readable_image_left_is_an_error(image_folder: Folder) -> None:
    root = image_folder({"": 2})
    dataset = build_pretrain_dataset(root, (32, 32))
    for path in root.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 2 images"):
        dataset[0]


# Splits and data sets


def test_split_is_stratified_seeded_and_disjoint() -> None:
    labels = [0] * 10 + [1] * 20 + [2] + [3] * 2
    train, val = stratified_split(labels, 0.2, 1)
    assert sorted(train + val) == list(range(33))
    assert [sum(labels[i] == c for i in val) for c in range(4)] == [2, 4, 0, 1]
    assert (train, val) == stratified_split(labels, 0.2, 1)
    assert val != stratified_split(labels, 0.2, 2)[1]
    for fraction in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="val_fraction"):
            stratified_split(labels, fraction, 0)


def test_digits_validation_is_never_pre_trained_on() -> None:
    pretrain = build_pretrain_dataset("digits", (32, 32), seed=3)
    train, val = build_finetune_datasets("digits", (32, 32), seed=3)
    np.testing.assert_array_equal(pretrain.source.digits, train.source.digits)  # type: ignore[attr-defined]
    assert len(train) + len(val) == 1797
    assert train.classes == [str(i) for i in range(10)]
    image, label = val[5]
    assert image.shape == (3, 32, 32)
    assert label == val.labels[5]  # type: ignore[index]
    back = image * torch.tensor(val.std).view(3, 1, 1) + torch.tensor(val.mean).view(3, 1, 1)
    torch.testing.assert_close(back[0], back[2], rtol=0, atol=1e-5)
    assert back.min() > -1e-5
    assert back.max() < 1 + 1e-5


@pytest.mark.parametrize("in_chans", [1, 2])
def test_digits_in_other_channel_counts(in_chans: int) -> None:
    dataset = build_pretrain_dataset("digits", (16, 24), in_chans)
    assert dataset[0].shape == (in_chans, 16, 24)
    assert len(dataset.mean) == in_chans
    if in_chans == 1:
        assert (dataset.mean, dataset.std) == ((0.5,), (0.5,))
    else:
        assert 0.1 < dataset.mean[0] < 0.5


def test_exported_digits_are_the_validation_part(tmp_path: Path) -> None:
    files = export_digits(tmp_path / "digits", seed=3)
    _, val = build_finetune_datasets("digits", (8, 8), seed=3)
    assert len(files) == len(val)
    listing = scan_images(tmp_path / "digits", labelled=True)
    assert sorted(listing.labels or []) == sorted(val.labels or [])
    stored = {np.asarray(Image.open(path)).tobytes() for path in files}
    assert stored == {digit.tobytes() for digit in val.source.digits}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="part must be"):
        export_digits(tmp_path, "test")


def test_folder_split_by_fraction(image_folder: Folder) -> None:
    root = image_folder({"red": 5, "green": 5})
    train, val = build_finetune_datasets(root, (32, 32), val_fraction=0.4, seed=1)
    assert (len(train), len(val)) == (6, 4)
    assert not set(train.source.paths) & set(val.source.paths)  # type: ignore[attr-defined]
    for path, label in zip(val.source.paths, val.labels or [], strict=True):  # type: ignore[attr-defined]
        assert val.classes[label] == path.parent.name


def test_folder_split_by_train_and_val(image_folder: Folder) -> None:
    root = image_folder({"b": 2, "a": 2, "c": 2}, "data/train").parent
    image_folder({"c": 1, "a": 3}, "data/val")
    train, val = build_finetune_datasets(root, (32, 32))
    assert (len(train), val.labels, val.classes) == (6, [0, 0, 0, 2], ["a", "b", "c"])
    assert len(build_pretrain_dataset(root, (32, 32))) == 6
    (root / "val" / "a").rename(root / "val" / "new")
    with pytest.raises(DataError, match="new"):
        build_finetune_datasets(root, (32, 32))


def test_finetuning_needs_classes(image_folder: Folder) -> None:
    with pytest.raises(DataError, match="at least two classes"):
        build_finetune_datasets(image_folder({"only": 3}, "one"), (32, 32))
    with pytest.raises(DataError, match="class folders"):
        build_finetune_datasets(image_folder({"": 3}, "flat"), (32, 32))
    with pytest.raises(DataError, match="second image"):
        build_finetune_datasets(image_folder({"a": 1, "b": 1}, "few"), (32, 32))
    assert len(build_pretrain_dataset(image_folder({"": 3}, "flat2"), (32, 32))) == 3


def test_samples_repeat_for_seed_epoch_and_index(image_folder: Folder) -> None:
    root = image_folder({"red": 4, "green": 4})
    augmentation = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)
    train, _ = build_finetune_datasets(root, (32, 32), augmentation=augmentation)
    train.set_epoch(2)
    first = train[1][0]
    assert not torch.equal(first, train[2][0])
    random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    assert torch.equal(first, train[1][0])
    assert torch.equal(first, next(iter(DataLoader(train, batch_size=8, num_workers=2)))[0][1])
    copy = pickle.loads(pickle.dumps(train))
    assert torch.equal(first, copy[1][0])
    train.set_epoch(3)
    assert not torch.equal(first, train[1][0])


def test_epoch_reaches_persistent_workers(image_folder: Folder) -> None:
    dataset = build_pretrain_dataset(image_folder({"": 2}), (32, 32))
    loader = DataLoader(dataset, batch_size=2, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        seen.append(next(iter(loader)))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_sample_seed_leaves_the_global_generators_alone() -> None:
    draws = []
    for inside in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        if inside:
            with pytest.raises(KeyError), sample_seed(1, 2, 3):
                random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
                raise KeyError
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert draws[0] == draws[1]


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (33, 500)])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_odd_shapes(tmp_path: Path, size: tuple[int, int], in_chans: int) -> None:
    save(Image.new("RGB", size, (200, 200, 200)), tmp_path / "x.png")
    dataset = build_pretrain_dataset(tmp_path, (32, 48), in_chans)
    for image in (dataset[0], dataset.examples(1)[0]):
        assert image.shape == (in_chans, 32, 48)
        expected = (200 / 255 - torch.tensor(dataset.mean)) / torch.tensor(dataset.std)
        torch.testing.assert_close(image.amax((1, 2)), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(image.amin((1, 2)), expected, rtol=0, atol=1e-4)


def test_extreme_aspect_is_cut_before_it_is_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *rest: object, **options: object) -> Image.Image:
        nonlocal largest
        largest = max(largest, *size)
        return resize(self, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert eval_transform((224, 224), (0.5,) * 3, (0.5,) * 3)(Image.new("RGB", (2, 5000))).shape == (3, 224, 224)
    assert 224 <= largest <= 8 * 256


def test_many_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(6):
        np.save(tmp_path / f"{index}.npy", (rng.random((40, 30, 5)) * [1, 2, 3, 4, 5] + 7).astype(np.float32))
    dataset = build_pretrain_dataset(tmp_path, (32, 32), 5)
    np.testing.assert_allclose(dataset.mean, np.array([1, 2, 3, 4, 5]) / 2 + 7, rtol=0.02)
    np.testing.assert_allclose(dataset.std, np.array([1, 2, 3, 4, 5]) / 12**0.5, rtol=0.05)
    assert dataset[0].shape == dataset.examples(1)[0].shape == (5, 32, 32)
    assert abs(torch.stack([dataset.examples(6)]).mean().item()) < 0.1
    with pytest.raises(ValueError, match="1 or 3 channels"):
        build_pretrain_dataset(tmp_path, (32, 32), 5, augmentation=Augmentation(color_jitter=0.4))


def test_given_statistics_are_used(image_folder: Folder) -> None:
    root = image_folder({"": 1})
    dataset = build_pretrain_dataset(root, (32, 32), mean=(0, 0, 0), std=(1, 1, 1))
    assert 0 <= dataset[0].min() <= dataset[0].max() <= 1
    for mean, std in (((0, 0), (1, 1)), ((0, 0, 0), (1, 0, 1)), ((float("nan"), 0, 0), (1, 1, 1)), ((0, 0, 0), None)):
        with pytest.raises(ValueError, match=r"mean|std"):
            build_pretrain_dataset(root, (32, 32), mean=mean, std=std)


def test_flip_and_crop_options() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16] = 255
    options = {"crop_scale": (0.2, 1.0), "hflip": 0.0}
    whole = Augmentation(crop_scale=(1, 1), hflip=1)
    flipped = train_transform((32, 32), (0.5,) * 3, (0.5,) * 3, whole, **options)(Image.fromarray(pixels))
    assert flipped[0, 0, 0] == -1
    assert flipped[0, 0, -1] == 1
    for wrong in ({"crop_scale": (0, 1)}, {"crop_scale": (1, 0.5)}, {"hflip": 2}, {"color_jitter": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Augmentation(**wrong)  # type: ignore[arg-type]


def test_prediction_keeps_unreadable_images_and_drops_other_files(image_folder: Folder) -> None:
    root = image_folder({"b": 1, "a": 1})
    (root / "a" / "broken.jpg").write_bytes(b"x")
    (root / "notes.txt").write_text("x")
    dataset = build_predict_dataset([root, root / "a" / "000.png"], (32, 32), 3, (0.5,) * 3, (0.5,) * 3)
    assert [path.relative_to(root).as_posix() for path in dataset.files] == ["a/000.png", "a/broken.jpg", "b/000.png"]
    assert [path.name for path, _ in dataset.skipped] == ["notes.txt"]
    images, indices, reasons = next(iter(DataLoader(dataset, batch_size=3)))
    assert indices.tolist() == [0, 1, 2]
    assert [bool(reason) for reason in reasons] == [False, True, False]
    assert images[1].abs().sum() == 0
    assert images[2].abs().sum() > 0
    with pytest.raises(DataError, match="no such file"):
        build_predict_dataset([root / "nowhere"], (32, 32), 3, (0.5,) * 3, (0.5,) * 3)


def test_preprocessing_from_metadata() -> None:
    imagenet = preprocessing_from_metadata({}, 3)
    assert imagenet[2] == (224, 224)
    assert imagenet[0][0] == 0.485
    given = {"mean": "[0.1, 0.2, 0.3]", "std": [1, 2, 3], "img_size": [64, 96]}
    assert preprocessing_from_metadata(given, 3) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), (64, 96))
    for wrong in ({"mean": "nonsense"}, {**given, "img_size": [0]}, {**given, "std": [1]}):
        with pytest.raises(ValueError, match=r"mean|img_size|expected"):
            preprocessing_from_metadata(wrong, 3)
    with pytest.raises(ValueError, match="mean and std"):
        preprocessing_from_metadata({}, 5)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m9-mstd0.5-inc1", "rand-m10", "augmix-m10", "original"])
def test_posterization_keeps_a_bit_at_every_level(policy):
    """At its highest level timm asks Pillow for 0 bits, which is an error there."""
    augmentation = Augmentation(auto_augment=policy)
    transform = train_transform((32, 32), (0.5,) * 3, (0.5,) * 3, augmentation, crop_scale=(0.2, 1), hflip=0.5)
    (policy_step,) = [step for step in transform.transforms if hasattr(step, "ops") or hasattr(step, "policy")]
    policies = [getattr(policy_step, "ops", []), *getattr(policy_step, "policy", [])]
    operations = [operation for one in policies for operation in one if operation.name.startswith("Posterize")]
    assert operations
    for operation in operations:
        operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10, 0
        operation(Image.new("RGB", (8, 8), "white"))

from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import Folder, save
from PIL import Image
from torch.utils.data import DataLoader

from convnextv2.data import (
    Augmentation,
    DataError,
    ImageDataset,
    build_finetune_datasets,
    build_predict_dataset,
    build_pretrain_dataset,
    folders,
    reading,
)
from convnextv2.data.decoding import Wanted


def paths(dataset: ImageDataset) -> list[Path]:
    return [dataset.source.source.paths[number] for number in dataset.source.numbers]  # type: ignore[attr-defined]


def test_folder_split_by_fraction(image_folder: Folder) -> None:
    root = image_folder({"red": 5, "green": 5})
    train, val = build_finetune_datasets(root, (32, 32), val_fraction=0.4, seed=1)
    assert (len(train), len(val)) == (6, 4)
    assert not set(paths(train)) & set(paths(val))
    for path, label in zip(paths(val), val.labels or [], strict=True):
        assert val.classes[label] == path.parent.name


def test_skipped_files_are_told_once(image_folder: Folder) -> None:
    root = image_folder({"red": 3, "green": 3})
    (root / "red" / "notes.txt").write_text("x")
    parts = build_finetune_datasets(root, (32, 32))
    expected = [(root / "red" / "notes.txt", "not an image, or a format that is not read")]
    assert [part.skipped for part in parts] == [expected, []]
    assert build_pretrain_dataset(root, (32, 32)).skipped == expected


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


def test_statistics_pass_over_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "FULL_CHECK_BYTES", 10)
    for index in range(6):
        np.save(tmp_path / f"{index}.npy", np.full((40, 30, 5), index, np.float32))
    np.save(tmp_path / "0.npy", np.full((40, 30, 5), np.nan, np.float32))  # whole, by its header
    monkeypatch.setattr(reading, "STATISTICS_SAMPLE", 2)  # the first and the last; the second stands in for the first
    dataset = build_pretrain_dataset(tmp_path, (32, 32), 5, wanted=Wanted(pixels="photo"))
    np.testing.assert_allclose(dataset.mean, 3)
    np.testing.assert_allclose(dataset.std, 2)
    assert dataset.replaced == [0]
    for index in range(6):
        np.save(tmp_path / f"{index}.npy", np.full((40, 30, 5), np.nan, np.float32))
    with pytest.raises(DataError, match=r"none of the 6 images can be read: .*/\d\.npy: pixels"):
        build_pretrain_dataset(tmp_path, (32, 32), 5, wanted=Wanted(pixels="photo"))


def test_a_wrong_number_of_channels_is_seen_in_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "FULL_CHECK_BYTES", 10)
    np.save(tmp_path / "a.npy", np.ones((40, 30, 5), np.float32))
    np.save(tmp_path / "b.npy", np.ones((40, 30, 4), np.float32))
    dataset = build_pretrain_dataset(tmp_path, (32, 32), 5)
    assert [(path.name, reason[:9]) for path, reason in dataset.skipped] == [("b.npy", "has the s")]

import pickle
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from data_helpers import Folder
from torch.utils.data import DataLoader

from convnextv2.data import (
    Augmentation,
    DataError,
    SequentialDataset,
    build_finetune_datasets,
    build_predict_dataset,
    build_pretrain_dataset,
    folders,
    scan_images,
)
from convnextv2.data.datasets import spread


def test_large_folders_are_checked_by_header_and_repaired_on_load(
    image_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder({"": 4})
    content = (root / "001.png").read_bytes()
    (root / "001.png").write_bytes(content[:-200])
    (root / "nothing.png").write_bytes(b"")
    assert len(scan_images(root).train.images.paths) == 3
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


class Numbers:
    """Eleven images that show their number, in the order of the shares."""

    def read(self, share: int, shares: int) -> Iterator[tuple[int, np.ndarray, int | None]]:
        for number in range(share, 11, shares):
            yield number, np.full((4, 4, 2), number, np.float32), number % 3


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_sequential_source_is_shared_without_loss_or_repeat(workers: int, processes: int) -> None:
    seen = []
    for process in range(processes):
        dataset = SequentialDataset(Numbers(), torch.from_numpy, process=process, processes=processes)
        for images, labels in DataLoader(dataset, batch_size=2, num_workers=workers):
            numbers = images[:, 0, 0, 0].int().tolist()
            assert labels.tolist() == [number % 3 for number in numbers]
            seen += numbers
    assert sorted(seen) == list(range(11))


def draw(_: object) -> torch.Tensor:
    return torch.rand(3)


def test_random_transforms_of_a_sequence_follow_seed_epoch_and_number() -> None:
    def samples(workers: int, epoch: int, **options: int) -> list[torch.Tensor]:
        dataset = SequentialDataset(Numbers(), draw, **options)
        dataset.set_epoch(epoch)
        images = [image for image, _ in DataLoader(dataset, batch_size=None, num_workers=workers)]
        return sorted(images, key=lambda image: image.tolist())

    first = torch.stack(samples(0, 0))
    assert len(first.unique()) == 33
    assert torch.equal(first, torch.stack(samples(2, 0)))
    assert not torch.equal(first, torch.stack(samples(0, 1)))
    assert not torch.equal(first, torch.stack(samples(0, 0, seed=1)))


@pytest.mark.parametrize(("total", "wanted", "first"), [(10, 5, [0, 2, 4, 6, 8]), (3, 8, [0, 1, 2]), (7, 3, [0, 2, 4])])
def test_images_are_taken_evenly_and_the_others_stay_as_replacements(total, wanted, first):
    numbers = spread(total, wanted)
    assert numbers[: len(first)] == first
    assert sorted(numbers) == list(range(total))


def test_examples_for_prediction_replace_what_cannot_be_read(image_folder: Folder) -> None:
    root = image_folder({"": 6})
    for name in ("000.png", "003.png"):
        (root / name).write_bytes(b"")
    dataset = build_predict_dataset([root], (32, 32), 3, (0.5,) * 3, (0.5,) * 3)
    images, unreadable = dataset.examples(3)
    assert [path.name for path, _ in unreadable] == ["000.png"]  # of 0, 2, 4, then the first of the others
    for image, number in zip(images, (2, 4, 1), strict=True):
        assert torch.equal(image, dataset[number][0])
    images, unreadable = dataset.examples(9)
    assert (len(images), len(unreadable)) == (4, 2)

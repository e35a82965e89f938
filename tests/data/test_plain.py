import itertools
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_helpers import Folder

from convnextv2.data import DataError, build_finetune_datasets, build_pretrain_dataset
from convnextv2.data.plain import PlainDataset, label_fraction


def test_every_image_once_and_none_for_another(image_folder: Folder) -> None:
    training, _ = build_finetune_datasets(image_folder({"a": 5, "b": 5}), (32, 32))
    plain = PlainDataset(training)
    assert (len(plain), plain.shape, plain.labels) == (8, (3, 32, 32), training.labels)
    assert plain.files == [training.source.source.paths[n] for n in training.source.numbers]  # type: ignore[attr-defined]
    plain.files[2].write_bytes(b"no image any more")
    assert training[2][0].shape == (3, 32, 32)  # its neighbour
    image, number, reason = pickle.loads(pickle.dumps(plain))[2]
    assert (int(image.count_nonzero()), number, bool(reason)) == (0, 2, True)
    image, number, reason = plain[3]
    assert (number, reason) == (3, "")
    assert torch.equal(image, training.plain_transform(training.source.load(3)))
    assert not torch.equal(image, training[3][0])  # which is augmented
    for file in plain.files:
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 8 images can be read"):
        PlainDataset(training)


def test_images_without_files_have_names() -> None:
    _, validation = build_finetune_datasets("digits", (8, 8), 1)
    assert PlainDataset(validation).files[0] == Path(f"image {validation.source.numbers[0]}")  # type: ignore[attr-defined]


def chosen(fraction: float, seed: int) -> dict[int, int]:
    """Numbers of the images to their labels."""
    training, _ = build_finetune_datasets("digits", (8, 8), 1)
    share = label_fraction(training, fraction, seed)
    assert share.labels is not None
    assert len(share) == len(share.labels) == len(share.damaged)
    numbers = share.source.numbers  # type: ignore[attr-defined]
    assert list(numbers) == sorted(set(numbers))
    assert [training.labels[number] for number in numbers] == share.labels  # type: ignore[index]
    return dict(zip(numbers, share.labels, strict=True))


def test_shares_of_labels_are_nested_and_of_every_class() -> None:
    training, _ = build_finetune_datasets("digits", (8, 8), 1)
    assert training.labels is not None
    all_of = Counter(training.labels)
    shares = [chosen(fraction, 0) for fraction in (1e-9, 0.05, 0.1, 0.5, 1.0)]
    for smaller, larger in itertools.pairwise(shares):
        assert smaller.items() < larger.items()
    assert Counter(shares[0].values()) == dict.fromkeys(range(10), 1)
    assert Counter(shares[2].values()) == {label: round(0.1 * count) for label, count in all_of.items()}
    assert len(shares[4]) == len(training)
    assert chosen(0.1, 0) == shares[2]
    other = chosen(0.1, 1)
    assert Counter(other.values()) == Counter(shares[2].values())
    assert len(other.keys() & shares[2].keys()) < len(other) / 2


def test_what_is_no_share(image_folder: Folder) -> None:
    training, _ = build_finetune_datasets(image_folder({"a": 2, "b": 2}), (32, 32))
    for wrong in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            label_fraction(training, wrong)
    with pytest.raises(DataError, match="has no labels"):
        label_fraction(build_pretrain_dataset(image_folder({"": 2}, "flat"), (32, 32)), 0.5)

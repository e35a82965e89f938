from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convnextv2.data import build_finetune_datasets, build_pretrain_dataset, export_digits, scan_images
from convnextv2.data.datasets import ImageDataset


def chosen(dataset: ImageDataset) -> np.ndarray:
    return dataset.source.source.digits[dataset.source.numbers]  # type: ignore[attr-defined]


def test_digits_validation_is_never_pre_trained_on() -> None:
    pretrain = build_pretrain_dataset("digits", (32, 32), seed=3)
    train, val = build_finetune_datasets("digits", (32, 32), seed=3)
    np.testing.assert_array_equal(chosen(pretrain), chosen(train))
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
    assert sorted(listing.train.labels or []) == sorted(val.labels or [])
    stored = {np.asarray(Image.open(path)).tobytes() for path in files}
    assert stored == {digit.tobytes() for digit in chosen(val)}
    with pytest.raises(ValueError, match="part must be"):
        export_digits(tmp_path, "test")

"""Pictures of neighbours: the nearest ones, in their colours, and what else a row of the metrics tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import make_images, pretrain_options

from convnextv2.models.config import EncoderConfig
from convnextv2.models.diversity import feature_diversity
from convnextv2.models.encoder import Encoder
from convnextv2.training import pretrain
from convnextv2.training.measures import duration, measures, pace
from convnextv2.training.neighbours import NEAREST, QUERIES, features_of, sample_size, save_neighbours

pytestmark = pytest.mark.pictures

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_features_are_those_of_evaluation_mode(tiny_encoder: EncoderConfig) -> None:
    encoder, images = Encoder(tiny_encoder).train(), torch.randn(5, 3, 32, 32)
    found = features_of(encoder, images, batch_size=2)
    assert encoder.training
    expected = encoder.eval().forward_features(images).mean((2, 3))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("count", "size"), [(9, (10, 14)), (2, (130, 150))])
def test_the_picture_shows_the_images(count: int, size: tuple[int, int], tmp_path: Path) -> None:
    pixels = (torch.rand(count, 3, *size) * 255).round() / 255
    normalised = (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    features = torch.eye(count) + 0.01
    features[-1] = features[0]  # the last one is nearest to the first
    save_neighbours(tmp_path / "x.png", normalised, features, mean=MEAN, std=STD)
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    scale, gap, text = (8, 8, 20) if size[1] == 14 else (1, 8, 20)
    rows, columns = min(count, QUERIES), 1 + min(count - 1, NEAREST)
    assert picture.shape[:2] == (rows * (size[0] * scale + text + gap) + gap, columns * (size[1] * scale + gap) + gap)
    top = gap + text
    for column, number in ((0, 0), (1, count - 1)):
        left = gap + column * (size[1] * scale + gap)
        cell = picture[top : top + size[0] * scale, left : left + size[1] * scale][
            scale // 2 :: scale, scale // 2 :: scale
        ]
        assert np.abs(cell - (pixels[number].permute(1, 2, 0) * 255).numpy()).max() <= 1.01
        assert picture[gap : top - 2, left : left + size[1] * scale].min() < 120  # a title is printed


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    for images, features in (
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 4)),
        (torch.zeros(3, 3, 8, 8), torch.zeros(2, 4)),
    ):
        with pytest.raises(ValueError, match="at least two images"):
            save_neighbours(tmp_path / "x.png", images, features, mean=MEAN, std=STD)
    assert not list(tmp_path.iterdir())
    save_neighbours(tmp_path / "x.png", torch.zeros(3, 1, 8, 8), torch.full((3, 4), torch.nan), mean=[0.0], std=[1.0])
    assert Image.open(tmp_path / "x.png").size[0] > 100


def test_large_images_are_fewer() -> None:
    assert sample_size(10_000, (3, 64, 64)) == 256
    assert sample_size(100, (3, 64, 64)) == 100
    assert sample_size(10_000, (3, 224, 224)) == 2**26 // (4 * 3 * 224 * 224)
    assert sample_size(10_000, (10, 4096, 4096)) == 2


def test_a_row_has_diversity_by_stage_weight_norm_and_memory(tiny_encoder: EncoderConfig) -> None:
    encoder, images = Encoder(tiny_encoder), torch.randn(3, 3, 32, 32)
    found = measures(torch.nn.ModuleDict({"encoder": encoder}), images)
    stages = [found[f"feature_diversity_{number}"] for number in (1, 2, 3, 4)]
    assert stages == list(feature_diversity(encoder, images))
    assert len(set(stages)) == 4
    assert found["feature_diversity"] == pytest.approx(sum(stages) / 4)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(0.5)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert measures(encoder, images)["weight_norm"] == pytest.approx(0.5 * count**0.5, rel=1e-5)
    other = measures(torch.nn.Linear(3, 4), images)
    assert set(other) == {"weight_norm", "memory_mib"}
    block = np.ones(2**25)  # 256 MiB
    assert measures(torch.nn.Linear(3, 4), images)["memory_mib"] >= block.nbytes / 2**20
    assert 100 < other["memory_mib"] < 2**20


def test_words_for_time() -> None:
    words = {0.04: "0.0 s", 9.6: "9.6 s", 12.4: "12 s", 89.4: "89 s", 100: "2 min", 5300: "88 min", 7260: "2 h 01 min"}
    assert {seconds: duration(seconds) for seconds in words} == words
    row = {"epoch": 3, "seconds": 200.0, "lr": 0.00123, "images_per_s": 31.4, "data_wait": 0.051}
    assert pace(row, 5) == "lr 1.23e-03, 31.4 images/s, 7 min left, 5 % waiting for data"
    assert pace(row, 3) == "lr 1.23e-03, 31.4 images/s, 5 % waiting for data"


@pytest.mark.pictures
def test_neighbours_are_drawn_after_the_last_epoch_in_any_case(tmp_path: Path) -> None:
    pretrain(pretrain_options(make_images(tmp_path / "set"), tmp_path / "run", reconstruct_every=0, probe="auto"))
    assert (tmp_path / "run" / "neighbours.png").is_file()
    assert not (tmp_path / "run" / "reconstructions").exists()

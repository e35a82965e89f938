from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convnextv2 import FCMAE, EncoderConfig, create_fcmae
from convnextv2.training.pictures import (
    MASKED_COLOUR,
    reconstruction_panels,
    save_confusion_matrix,
    save_loss_curve,
    save_reconstructions,
)

pytestmark = pytest.mark.pictures

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def model(tiny_encoder: EncoderConfig) -> FCMAE:
    return create_fcmae(tiny_encoder, img_size=(48, 64), decoder_dim=16, backend="reference").train()


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def test_panels_are_the_pixels(model: FCMAE) -> None:
    pixels = torch.rand(2, 3, 48, 64)
    mask = torch.zeros(2, 3, 4)
    mask[:, 1, 2] = 1
    panels, used = reconstruction_panels(model, normalised(pixels), mask, mean=MEAN, std=STD)
    assert model.training
    assert panels.shape == (2, 4, 3, 48, 64)
    assert torch.equal(used, mask.flatten(1))
    original, masked, prediction, pasted = panels.unbind(1)
    torch.testing.assert_close(original, pixels, rtol=0, atol=1e-5)
    hole = torch.zeros(48, 64, dtype=torch.bool)
    hole[16:32, 32:48] = True
    slate = torch.tensor(MASKED_COLOUR)[None, :, None].expand(2, 3, 256)
    torch.testing.assert_close(masked[..., hole], slate)
    torch.testing.assert_close(masked[..., ~hole], original[..., ~hole])
    torch.testing.assert_close(pasted[..., hole], prediction[..., hole])
    torch.testing.assert_close(pasted[..., ~hole], original[..., ~hole])
    # An untrained network predicts about 0, which de-normalises to the mean of the patch, over its three channels.
    mean = normalised(pixels)[..., hole].mean((1, 2))
    expected = mean[:, None] * torch.tensor(STD) + torch.tensor(MEAN)
    torch.testing.assert_close(prediction[..., hole].mean(2), expected, rtol=0, atol=0.05)


def test_values_beyond_are_clamped(model: FCMAE) -> None:
    images = normalised(torch.cat((torch.full((1, 3, 48, 64), 3.0), torch.full((1, 3, 48, 64), -3.0))))
    panels, _ = reconstruction_panels(model, images, mean=MEAN, std=STD)
    assert panels[0, 0].unique().tolist() == [1]
    assert panels[1, 0].unique().tolist() == [0]


def test_masks_follow_generator_and_ratio(model: FCMAE) -> None:
    images = torch.zeros(1, 3, 48, 64)

    def drawn(seed: int, ratio: float | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return reconstruction_panels(model, images, None, generator, mean=MEAN, std=STD, mask_ratio=ratio)[1]

    assert torch.equal(drawn(1), drawn(1))
    assert any(not torch.equal(drawn(1), drawn(seed)) for seed in range(2, 6))
    assert drawn(1, 0.25).sum() == 3


@pytest.mark.parametrize(("channels", "shown"), [(1, (0, 0, 0)), (2, (0, 0, 0)), (5, (0, 1, 2))])
def test_other_channel_counts(channels: int, shown: tuple[int, ...]) -> None:
    encoder = EncoderConfig((1, 1, 1, 1), (8, 8, 8, 8), in_chans=channels, patch_size=8)
    model = create_fcmae(encoder, img_size=32, decoder_dim=8, backend="reference")
    images = torch.rand(1, channels, 32, 32)
    panels, _ = reconstruction_panels(model, images, mean=[0.0] * channels, std=[1.0] * channels)
    torch.testing.assert_close(panels[:, 0], images[:, shown])


def test_picture_shows_every_pixel_in_its_colour(model: FCMAE, tmp_path: Path) -> None:
    pixels = (torch.rand(3, 3, 48, 64) * 255).round() / 255
    save_reconstructions(tmp_path / "x.png", *reconstruction_panels(model, normalised(pixels)[:2], mean=MEAN, std=STD))
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    scale, gap, heading = 4, 8, 34
    assert picture.shape[:2] == (2 * (48 * scale + gap) + heading, 4 * 64 * scale + 5 * gap)
    for row in range(2):
        top = heading + row * (48 * scale + gap)
        cell = picture[top : top + 48 * scale, gap : gap + 64 * scale]
        centres = cell[scale // 2 :: scale, scale // 2 :: scale]
        expected = (pixels[row].permute(1, 2, 0) * 255).numpy()
        assert np.abs(centres - expected).max() <= 1.01
    heading_row = picture[: heading - 4]
    for column in range(4):
        left = gap + column * (64 * scale + gap)
        assert heading_row[:, left : left + 64 * scale].min() < 80  # a title is printed over every column


def test_failed_pictures_leave_no_file(model: FCMAE, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="divisible"):
        save_reconstructions(
            tmp_path / "x.png", *reconstruction_panels(model, torch.zeros(1, 3, 40, 64), mean=MEAN, std=STD)
        )
    with pytest.raises(ValueError, match="no loss"):
        save_loss_curve(tmp_path / "x.png", [{"epoch": 1, "loss": float("nan")}])
    with pytest.raises(ValueError, match=r"\[3, 3\]"):
        save_confusion_matrix(tmp_path / "x.png", [[1, 2], [3, 4]], ["a", "b", "c"])
    assert list(tmp_path.iterdir()) == []


def colours(path: Path) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)))


def test_loss_curve_draws_what_there_is(tmp_path: Path) -> None:
    blue, orange, green = (31, 119, 180), (255, 127, 14), (44, 160, 44)
    save_loss_curve(tmp_path / "a.png", [{"epoch": e, "loss": 1 / e} for e in range(1, 40)])
    assert blue in colours(tmp_path / "a.png")
    assert orange not in colours(tmp_path / "a.png")
    rows = [
        {"epoch": e, "train_loss": 1 / e, "val_loss": None if e == 2 else 2 / e, "val_top1": 9.0 * e} for e in (1, 2, 3)
    ]
    save_loss_curve(tmp_path / "b.png", rows)
    assert {blue, orange, green} <= colours(tmp_path / "b.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [["daisy", "$x_1", "玫瑰 bla"], [f"class {i}" for i in range(45)]])
def test_confusion_matrix_of_any_names(tmp_path: Path, classes: list[str]) -> None:
    save_confusion_matrix(tmp_path / "x.png", torch.eye(len(classes), dtype=torch.int64) * 5, classes)
    darkest = (8, 48, 107)  # the whole share of "Blues"
    assert darkest in colours(tmp_path / "x.png")


def test_runs_without_a_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    save_loss_curve(tmp_path / "x.png", [{"epoch": 1, "loss": 1.0}])
    assert (tmp_path / "x.png").stat().st_size > 1000

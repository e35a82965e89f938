from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convnextv2 import EncoderConfig, create_fcmae
from convnextv2.weights.checkpoint import save_checkpoint

pytestmark = pytest.mark.pictures


@pytest.fixture
def autoencoder(tmp_path: Path, tiny_encoder: EncoderConfig) -> Callable[[], Path]:
    def make() -> Path:
        model = create_fcmae(tiny_encoder, img_size=(48, 64), decoder_dim=16)
        path = tmp_path / "run" / "checkpoints" / "last.safetensors"
        save_checkpoint(path, model, model.config, {})
        return path

    return make


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_pictures_follow_the_seed(script: Any, autoencoder: Any, image_folder: Any, tmp_path: Path) -> None:
    path, root = autoencoder(), image_folder({"": 2})
    (root / "broken.png").write_bytes(b"x")
    shots = []
    for number, seed in enumerate((1, 1, 2)):
        output = tmp_path / f"{number}.png"
        result = script("visualize", path, root, "--output", output, "--seed", seed)
        assert result.status == 0, result.err
        assert "2 reconstructions" in result.out
        assert "broken.png" in result.err
        shots.append(picture(output))
    assert (shots[0] == shots[1]).all()
    assert (shots[0] != shots[2]).any()


def test_mask_file(script: Any, autoencoder: Any, image_folder: Any, tmp_path: Path) -> None:
    root = image_folder({"": 1})
    (tmp_path / "mask.txt").write_text("....\n.##.\n....\n")
    output = tmp_path / "x.png"
    result = script("visualize", autoencoder(), root / "000.png", "--output", output, "--mask", tmp_path / "mask.txt")
    assert result.status == 0, result.err
    shot, gap, heading, scale = picture(output), 8, 34, 4
    original = shot[heading : heading + 48 * scale, gap : gap + 64 * scale]
    masked = shot[heading : heading + 48 * scale, 2 * gap + 64 * scale : 2 * gap + 128 * scale]
    changed = (np.abs(original - masked).max(-1) > 1)[2::4, 2::4]
    assert changed[16:32, 16:48].all()
    assert changed.sum() == 2 * 16 * 16


def test_wrong_masks(script: Any, autoencoder: Any, image_folder: Any, tmp_path: Path) -> None:
    path, root, output = autoencoder(), image_folder({"": 1}), tmp_path / "x.png"
    mask = tmp_path / "mask.txt"
    for content, word in (
        (b"01\n10\n", "a mask of 2×2 patches, expected 3×4"),
        (b"0z\n", "lines of 0"),
        (b"", "nothing"),
        (b"\xff\xfe\x00", "mask.txt"),
        (b"000\n00\n", "one length"),
    ):
        mask.write_bytes(content)
        result = script("visualize", path, root, "--output", output, "--mask", mask)
        assert (result.status, len(result.err.splitlines())) == (2, 1)
        assert word in result.err
    result = script("visualize", path, root, "--output", output, "--mask", tmp_path / "none.txt")
    assert result.status == 2
    assert "none.txt: No such file" in result.err
    result = script("visualize", path, root, "--output", output, "--mask", mask, "--mask-ratio", 0.5)
    assert result.status == 2
    for ratio in (0, 1, "nan", -1):
        result = script("visualize", path, root, "--output", output, "--mask-ratio", ratio)
        assert (result.status, len(result.err.splitlines())) == (2, 1)
        assert "mask_ratio" in result.err
    assert not output.exists()

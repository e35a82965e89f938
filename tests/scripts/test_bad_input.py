"""What users get wrong: one line and status 2, or a notice; never a traceback, never half a file."""

import errno
import io
from pathlib import Path
from typing import Any

import pytest

from convnextv2 import EncoderConfig, create_fcmae, create_model
from convnextv2.weights.checkpoint import save_checkpoint

CHECKPOINTS = {"predict": "classifier.pth", "visualize": "fcmae.pth"}


@pytest.fixture
def place(tmp_path: Path, tiny_encoder: EncoderConfig, image_folder: Any) -> Path:
    fcmae = create_fcmae(tiny_encoder, img_size=32, decoder_dim=16)
    save_checkpoint(tmp_path / "fcmae.pth", fcmae, fcmae.config)
    classifier = create_model(tiny_encoder, num_classes=3)
    save_checkpoint(tmp_path / "classifier.pth", classifier, classifier.config, {"img_size": [32, 32]})
    headless = create_model(tiny_encoder, num_classes=0)
    save_checkpoint(tmp_path / "headless.pth", headless, headless.config)
    image_folder({"": 2}, "images")
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path


def fails(script: Any, place: Path, name: str, *arguments: object, word: str) -> None:
    output = place / "out" / "result"
    result = script(name, *arguments, *([] if "--output" in arguments else ["--output", output]))
    lines = [line for line in result.err.splitlines() if not line.startswith(("usage:", " ", "notice:"))]
    assert result.status == 2
    assert len(lines) == 1, result.err
    assert word in lines[0], result.err
    assert "Traceback" not in result.err
    assert list((place / "out").iterdir()) == []


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_inputs(script: Any, place: Path, name: str) -> None:
    checkpoint = place / CHECKPOINTS[name]
    fails(script, place, name, checkpoint, place / "nowhere", word="no such file")
    fails(script, place, name, checkpoint, place / "empty", word="found none")
    fails(script, place, name, checkpoint, place / "images", "--img-size", 8, word="the patch size 16")
    fails(script, place, name, checkpoint, place / "images", "--img-size", "0", word="size in pixels")
    fails(script, place, name, checkpoint, place / "images", "--device", "toaster", word="toaster")


def test_only_unreadable_images(script: Any, place: Path) -> None:
    for path in (place / "images").iterdir():
        path.write_bytes(b"")
    fails(script, place, "visualize", place / "fcmae.pth", place / "images", word="none of the 2 files")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(script: Any, place: Path, name: str) -> None:
    good = (place / CHECKPOINTS[name]).read_bytes()
    images = place / "images"
    fails(script, place, name, place / "nowhere.pth", images, word="nowhere.pth")
    for content in (b"", b"text", good[: len(good) // 2], good[:-10]):
        (place / "bad.pth").write_bytes(content)
        fails(script, place, name, place / "bad.pth", images, word="bad.pth")
    other = CHECKPOINTS["visualize" if name == "predict" else "predict"]
    fails(script, place, name, place / other, images, word=other)
    fails(script, place, name, place / "headless.pth", images, word="headless.pth")
    fails(script, place, name, images / "000.png", images, word="000.png")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_output_folder(script: Any, place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, images = place / CHECKPOINTS[name], place / "images"
    fails(script, place, name, checkpoint, images, "--output", place / "out", word="is a folder")
    fails(
        script,
        place,
        name,
        checkpoint,
        images,
        "--output",
        checkpoint / "x",
        word="classifier.pth" if name == "predict" else "fcmae.pth",
    )
    real = io.open

    def full(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "w" in mode and "out" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return real(file, mode, *rest, **options)

    monkeypatch.setattr(io, "open", full)
    monkeypatch.setattr("builtins.open", full)
    fails(script, place, name, checkpoint, images, word="No space left on device")


def test_read_only_output(script: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    arguments = (place / "classifier.pth", place / "images", "--output", place / "out" / "new" / "x.csv")
    fails(script, place, "predict", *arguments, word="Permission denied")

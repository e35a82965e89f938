import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from convnextv2 import ConvNeXtV2, EncoderConfig, create_fcmae
from convnextv2.evaluation.prediction import Prediction, class_names, load_classifier, predict_images, right_by_folder
from convnextv2.models.config import ClassifierConfig
from convnextv2.weights.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from convnextv2.weights.loading import complete_model

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
METADATA = {"img_size": [32, 48], "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 2.0]}


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_encoder: EncoderConfig) -> Callable[..., Path]:
    def make(names: tuple[str, ...] = ("a", "b", "c")) -> Path:
        config = ClassifierConfig(tiny_encoder, 3, head_init_scale=50, class_names=names)
        path = tmp_path / "runs" / "finetune" / "checkpoints" / "best.safetensors"
        save_checkpoint(path, ConvNeXtV2(config), config, METADATA)
        return path

    return make


def test_predictions_are_those_of_the_network(checkpoint: Any, image_folder: Any) -> None:
    root = image_folder({"x": 3, "y": 2})
    (root / "x" / "001.png").write_bytes(b"")
    classifier = load_classifier(checkpoint())
    assert (classifier.classes, classifier.mean, classifier.img_size) == (("a", "b", "c"), (0.1, 0.2, 0.3), (32, 48))
    dataset = classifier.dataset([root / "y", root / "x"])
    found = list(predict_images(classifier, dataset, batch_size=2))
    assert [prediction.file for prediction in found] == dataset.files == sorted(root.glob("*/*"))
    for number, prediction in enumerate(found):
        if number == 1:
            assert (prediction.classes, prediction.probabilities, prediction.error) == ((), (), "empty file")
            continue
        with torch.no_grad():
            expected = classifier.model(dataset[number][0][None]).softmax(1)[0]
        assert prediction.error == ""
        assert sorted(prediction.classes) == ["a", "b", "c"]
        assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)
        for name, probability in zip(prediction.classes, prediction.probabilities, strict=True):
            assert probability == pytest.approx(expected["abc".index(name)].item(), abs=1e-6)
    first = next(iter(predict_images(classifier, dataset, topk=1)))
    assert (first.classes, len(first.probabilities)) == (found[0].classes[:1], 1)


def test_gradients_and_mode_are_left_alone(checkpoint: Any, image_folder: Any) -> None:
    classifier = load_classifier(checkpoint())
    assert not classifier.model.training
    inside = []
    classifier.model.register_forward_hook(lambda *_: inside.append(torch.is_inference_mode_enabled()))
    for _ in predict_images(classifier, classifier.dataset([image_folder({"": 2})]), batch_size=1):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert inside == [True, True]


def test_progress_and_workers(checkpoint: Any, image_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = load_classifier(checkpoint())
    dataset = classifier.dataset([image_folder({"": 16})])
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    seen = []

    def watch(loader: Any) -> Iterable[Any]:
        seen.append((len(loader), loader.num_workers))
        return loader

    for batch_size, workers in ((2, None), (3, None), (3, 1)):
        assert (
            len(list(predict_images(classifier, dataset, batch_size=batch_size, workers=workers, progress=watch))) == 16
        )
    assert seen == [(8, 1), (6, 0), (6, 1)]  # workers by themselves from eight batches on


def test_another_size_and_what_cannot_predict(checkpoint: Any, tmp_path: Path, tiny_encoder: EncoderConfig) -> None:
    path = checkpoint()
    for size in ((64, 32), (40, 33)):
        assert load_classifier(path, img_size=size).img_size == size
    with pytest.raises(ValueError, match="smaller than the patch size"):
        load_classifier(path, img_size=(40, 15))
    fcmae = create_fcmae(tiny_encoder, img_size=32, decoder_dim=16)
    save_checkpoint(tmp_path / "fcmae.pth", fcmae, fcmae.config)
    with pytest.raises(CheckpointError, match="has no classifier"):
        load_classifier(tmp_path / "fcmae.pth")


def test_class_names(checkpoint: Any, caplog: pytest.LogCaptureFixture) -> None:
    def names(path: Path) -> tuple[str, ...]:
        checkpoint = load_checkpoint(path)
        return class_names(checkpoint, complete_model(checkpoint))  # type: ignore[arg-type]  # a classifier

    path = checkpoint(())
    assert names(path) == ("0", "1", "2")
    run, beside = path.parent.parent / "class_indices.json", path.parent / "class_indices.json"
    run.write_text(json.dumps({"0": "x", "1": "y", "2": "z"}))
    assert names(path) == ("x", "y", "z")
    beside.write_text(json.dumps({"0": 7, "1": 8, "2": 9}))
    assert names(path) == ("7", "8", "9")
    for wrong in ("[]", '{"0": "x", "1": "y"}', '{"0": 1, "1": 2, "3": 3}', "7", "nonsense", "[" * 100_000):
        caplog.clear()
        beside.write_text(wrong)
        assert names(path) == ("x", "y", "z")
        assert len(caplog.messages) == 1
        assert re.search(r"class_indices\.json: passed over: expected .* for the 3 classes", caplog.text)
    assert names(checkpoint()) == ("a", "b", "c")  # the checkpoint's own come first


def test_accuracy_by_folder_names() -> None:
    right, wrong = Prediction(Path("/a/b/1.png"), ("b", "a")), Prediction(Path("/b/a/x/2.png"), ("b", "a"))
    assert right_by_folder([right, wrong, right], ["a", "b"]) == 2
    assert right_by_folder([right, Prediction(Path("/elsewhere/3.png"), ("a",))], ["a", "b"]) is None
    assert right_by_folder([], ["a", "b"]) is None


def test_the_example_of_the_guide(
    checkpoint: Any, image_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint()
    image_folder({"": 3}, "photos")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (example,) = [block for block in blocks if "load_classifier" in block]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, PAGE.name, "exec"), {})
    assert [line.split()[0] for line in printed.getvalue().splitlines()] == [f"photos/00{i}.png" for i in range(3)]

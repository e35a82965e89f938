"""Classify images with a fine-tuned checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from convnextv2.data import PredictDataset, build_predict_dataset
from convnextv2.data.decoding import USUAL, Wanted
from convnextv2.data.names import shown
from convnextv2.data.reading import as_trained
from convnextv2.evaluation.imagenet import IMAGENET, imagenet_classes
from convnextv2.evaluation.inference import Inference
from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import check_image_size
from convnextv2.weights.beside import class_names_of, names_beside
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from convnextv2.weights.loading import complete_model


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image and their probabilities, or the reason why its file cannot be read."""

    file: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Classifier:
    """A network for prediction, the names of its classes, how its images are prepared: mean, std, (H, W), what its
    checkpoint says about how they are read, and what classes are in words where their names do not say."""

    model: ConvNeXtV2
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    img_size: tuple[int, int]
    reading: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)

    def dataset(self, inputs: Sequence[str | Path], wanted: Wanted = USUAL) -> PredictDataset:
        """Image files, and those in folders, as :func:`~convnextv2.data.build.build_predict_dataset` finds them."""
        channels = self.model.encoder_config.in_chans
        wanted = as_trained(wanted, self.reading)
        return build_predict_dataset(inputs, self.img_size, channels, self.mean, self.std, wanted=wanted)


def load_classifier(
    path: str | Path, *, device: str | torch.device = "cpu", img_size: tuple[int, int] | None = None
) -> Classifier:
    """The classifier of a fine-tuning run.

    Args:
        path: checkpoint, or run folder.
        img_size: (H, W) in pixels; None takes the checkpoint's.

    Raises:
        CheckpointError: if the checkpoint cannot be read or has no classifier.
        ValueError: if its metadata is malformed, or the size is not divisible by the patch size.
    """
    checkpoint = load_checkpoint(path)
    model = complete_model(checkpoint).to(device).eval()
    if not isinstance(model, ConvNeXtV2) or model.config.num_classes == 0:
        raise CheckpointError(f"{checkpoint.path}: has no classifier; fine-tune it first (fcmae finetune)")
    classes = class_names(checkpoint, model)
    mean, std, own_size = checkpoint.preprocessing(model.encoder_config.in_chans)
    check_image_size(img_size or own_size, model.encoder_config.patch_size, dense=True)
    words = imagenet_classes() if checkpoint.metadata.get("classes") == IMAGENET else {}
    return Classifier(model, classes, mean, std, img_size or own_size, checkpoint.metadata, words)


def class_names(checkpoint: Checkpoint, model: ConvNeXtV2) -> tuple[str, ...]:
    """Names from the checkpoint, or the synsets of a published one, else those that
    :func:`~.weights.beside.names_beside` finds, else numbers."""
    stated = model.config.class_names or class_names_of(checkpoint.metadata)
    count = model.config.num_classes
    if len(stated) == count:
        return tuple(stated)
    if checkpoint.metadata.get("classes") == IMAGENET and count == len(imagenet_classes()):
        return tuple(imagenet_classes())
    return names_beside(checkpoint.path, count) or tuple(map(str, range(count)))


@torch.inference_mode()
def predict_images(
    classifier: Classifier,
    dataset: PredictDataset,
    *,
    topk: int = 5,
    batch_size: int = 64,
    workers: int | None = None,
    precision: str = "auto",
    compile: str | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Iterator[Prediction]:
    """One prediction a file, in the data set's order, as they come.

    Args:
        dataset: from :meth:`Classifier.dataset`.
        topk: likeliest classes to give; at most all.
        workers, precision, compile: see :class:`~.inference.Inference`; ValueError if the device lacks a precision.
        progress: wraps the batches.
    """
    topk = min(topk, len(classifier.classes))
    inference = Inference(classifier.model, dataset, batch_size, precision=precision, compile=compile)
    for images, indices, errors in progress(inference.batches(workers)):
        best, order = inference.probabilities(images).topk(topk)
        for index, error, values, numbers in zip(indices.tolist(), errors, best.tolist(), order.tolist(), strict=True):
            if error:
                yield Prediction(dataset.files[index], error=error)
            else:
                names = tuple(classifier.classes[number] for number in numbers)
                yield Prediction(dataset.files[index], names, tuple(values))


def right_by_folder(predictions: Sequence[Prediction], classes: Sequence[str]) -> int | None:
    """How many predictions are right, if every image lies in a folder named like a class (the nearest counts)."""
    known = set(classes)
    above = ([shown(folder.name) for folder in p.file.absolute().parents] for p in predictions)
    true = [next((name for name in names if name in known), None) for names in above]
    if not predictions or None in true:
        return None
    return sum(p.classes[0] == label for p, label in zip(predictions, true, strict=True))

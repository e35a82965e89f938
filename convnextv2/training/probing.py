"""Whether a pre-training learns: neighbours and a linear classifier on frozen features, in a share of its time."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from convnextv2.data.build import build_finetune_datasets
from convnextv2.data.datasets import ImageDataset
from convnextv2.data.plain import PlainDataset, label_fraction
from convnextv2.data.reading import shown_statistics, wanted_of
from convnextv2.data.sources import describe_skipped
from convnextv2.evaluation.features import Features, extract_features
from convnextv2.evaluation.knn import knn_predict
from convnextv2.evaluation.linear import fit_linear, linear_predict
from convnextv2.evaluation.scores import score
from convnextv2.messages import one_line
from convnextv2.models.encoder import Encoder
from convnextv2.training.budget import SHARE, Budget, Kept, TooLongError, until
from convnextv2.training.device import Accelerator
from convnextv2.training.measures import duration
from convnextv2.training.neighbours import features_of, sample_size, save_neighbours
from convnextv2.training.probe_options import ProbeOptions
from convnextv2.training.processes import in_first_process
from convnextv2.training.task import Task

TRIED, TRIALS = 32, 3
"""Images of which the time is taken after an epoch before the first probe, and in how many epochs of a session."""
TOO_LONG = 1.5
"""Times the guess that is expected of a pass which was given up."""
UNSEEN = 1.5
"""Images of both parts for each that is trained on, as long as they are not known; looking for labels included."""
KEPT_BYTES = 2**28
"""Of decoded images that stay in memory from one probe to the next, for the training and for the validation part."""
LINEAR_SECONDS = 2e-6
"""A guess for each image, feature and class, until the first classifier was fitted: trained features take longer than
the 3e-7 to 7e-7 of random ones that were measured."""
LONGEST_WAIT = 300.0
"""Seconds for which the first of several processes may let the others wait; torch gives them up after ten minutes."""
Say = Callable[[str], None]
O = TypeVar("O", bound=ProbeOptions)  # noqa: E741  # of options


def snapshot(encoder: Encoder) -> Encoder:
    """Another encoder on the same memory, as ``load_encoder`` makes it of a checkpoint: in evaluation mode, not
    compiled; what it does to its layout leaves the first one alone."""
    with torch.device("meta"):
        copy = Encoder(encoder.encoder_config)
    copy.load_state_dict(encoder.state_dict(), assign=True)
    return copy.eval().requires_grad_(False)


@contextlib.contextmanager
def as_alone(device: torch.device) -> Iterator[None]:
    """Random generators and precision of products as in a process that evaluates; those of the run come back."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = cudnn


class Probing:
    """Probes of a run's encoder, made in its first process; the others wait.

    Args:
        options: of the run.
        training: the images that it trains on; mean and standard deviation are theirs.
        saved: what :attr:`state` was, of a run that is resumed.

    Raises:
        DataError: if images that ``probe`` names cannot be used.
    """

    def __init__(self, options: Any, training: ImageDataset, saved: Any = None) -> None:
        self._options, self._training = options, training
        self._budget = Budget.read(saved)
        self._parts: list[ImageDataset] = []
        self._images: list[tuple[PlainDataset, Kept]] = []
        self._examples: Tensor | None = None
        self._image, self._trials, self._failed = 0.0, 0, False
        self.last = ""
        """What the last probe of this session found, in words; empty for none."""
        auto = str(options.probe) == "auto"
        self._probes = bool(options.probe_data) and not (auto and not may_be_labelled(options.probe_data))
        if self._probes and not auto:
            self._open()

    @property
    def state(self) -> dict[str, float]:
        """What a resumed run has to know."""
        return asdict(self._budget)

    def after_epoch(
        self, accelerator: Accelerator, encoder: Encoder, row: Mapping[str, Any], say: Say, draws: bool
    ) -> dict[str, float]:
        """Probe the encoder, and draw neighbours if ``draws`` is true, if each is due; for all processes at once.

        What fails is told in a line, and not tried again in this session.

        Returns:
            Numbers for the row of the epoch: ``knn_top1`` and ``linear_top1`` in per cent, and ``probe_seconds``, which
            both and the picture took; what was not due is not among them.
        """
        self._budget.trained += row["seconds"]
        if not self._options.probe_data or self._failed:
            return {}
        found, others = in_first_process(partial(self._work, accelerator, encoder, row, say, draws))
        self._failed, self.last, self._budget = others
        return found

    def _work(
        self, accelerator: Accelerator, encoder: Encoder, row: Mapping[str, Any], say: Say, draws: bool
    ) -> tuple[dict[str, float], tuple[bool, str, Budget]]:
        found, before = dict[str, float](), self._budget.spent
        with as_alone(accelerator.device):
            try:
                self._try(encoder, accelerator, row)
                if self._probes:
                    self._probe(found, accelerator, encoder, row, say)
                if draws:
                    self._draw(encoder, row["epoch"])
            except (ValueError, OSError, torch.OutOfMemoryError) as error:  # training goes on without
                say(f"notice: no more probes: {one_line(error)}")
                self._failed = True
        if self._budget.spent > before:
            found["probe_seconds"] = round(self._budget.spent - before, 3)
        return found, (self._failed, self.last, self._budget)

    def _try(self, encoder: Encoder, accelerator: Accelerator, row: Mapping[str, Any]) -> None:
        """See how long an image takes, unless a probe has shown it and if there is time: the most counts, but for the
        first time, which is a slow one. A step of training takes longer."""
        most = accelerator.num_processes / max(row["images_per_s"], 1e-3)
        count, budget = min(TRIED, len(self._training)), self._budget
        asked = self._options.probe_every is not None and not self._trials
        if (
            not budget.features
            and self._trials < TRIALS
            and (asked or budget.allows(most * count, 0, row["epoch"] / self._options.epochs))
        ):
            with self._spending():
                start = time.perf_counter()
                images, network = self._training.examples(count), snapshot(encoder)
                read = time.perf_counter()
                features_of(network, images)
                seen = time.perf_counter()
            self._trials += 1
            # For a GPU several processes decode.
            hands = min(4, os.cpu_count() or 1) if accelerator.device.type == "cuda" and self._options.workers else 1
            seconds = ((read - start) / hands + seen - read) / count
            budget.image = max(budget.image, seconds) if self._trials > 2 else seconds
        self._image = min(budget.image or most, most)

    def _probe(
        self, found: dict[str, float], accelerator: Accelerator, encoder: Encoder, row: Mapping[str, Any], say: Say
    ) -> None:
        """Put into ``found`` what is due."""
        images = sum(map(len, self._parts)) or UNSEEN * len(self._training)
        features = self._budget.features or self._image * images
        if accelerator.num_processes > 1 and self._budget.image and features > LONGEST_WAIT:
            raise ValueError(f"other processes would wait for {duration(features)}; name fewer images with `probe`")
        if not self._due(row, features, features, "kNN", say):
            return
        if not self._parts:
            with self._spending():
                self._open()
        try:
            with self._spending() as pass_seconds:
                train, val = self._features(encoder, accelerator.device, say)
                predicted = knn_predict(train, val.values, device=accelerator.device)
                found["knn_top1"] = score(predicted, val.labels, val.classes).top1
        except TooLongError:
            self._budget.features = max(TOO_LONG * features, pass_seconds[0])
            say(f"notice: a probe was given up after {duration(pass_seconds[0])}, {SHARE:.0%} of the time so far")
            return
        self._budget.features = features = pass_seconds[0]
        self.last = f"kNN {found['knn_top1']:.2f} %"
        linear = self._budget.linear or LINEAR_SECONDS * train.values.numel() * len(train.classes)
        if accelerator.num_processes > 1 and linear > LONGEST_WAIT:
            say(f"notice: no linear classifier, for which other processes would wait for about {duration(linear)}")
        elif self._due(row, linear, features + linear, "a linear classifier", say):
            with self._spending() as fit_seconds:
                predicted = linear_predict(fit_linear(train, seed=self._options.seed), val.values)
                found["linear_top1"] = score(predicted, val.labels, val.classes).top1
            self._budget.linear = fit_seconds[0]
            self.last += f", linear {found['linear_top1']:.2f} %"
        self.last += f" (epoch {row['epoch']})"

    def _due(self, row: Mapping[str, Any], cost: float, last: float, what: str, say: Say) -> bool:
        """Whether something that takes so many seconds is to be done after this epoch; ``last`` will after the last."""
        epoch, epochs, every = row["epoch"], self._options.epochs, self._options.probe_every
        if every is not None:
            return bool(epoch % every == 0 or epoch == epochs)
        due = self._budget.allows(cost, 0 if epoch == epochs else last, epoch / epochs)
        if epoch == epochs and not due:
            spent, trained = self._budget.spent, duration(self._budget.trained)
            before = f" after {duration(spent)} for earlier ones" if spent >= 0.05 else ""
            say(
                f"notice: no probe by {what} after the last epoch: about {duration(cost)}{before} would be more than "
                f"{SHARE:.0%} of the {trained} of training; `probe_every` says when to probe nevertheless"
            )
        return due

    @contextlib.contextmanager
    def _spending(self) -> Iterator[list[float]]:
        """Its seconds are counted, and in the list when the block has ended."""
        start, seconds = time.perf_counter(), list[float]()
        try:
            yield seconds
        finally:
            seconds.append(time.perf_counter() - start)
            self._budget.spent += seconds[0]

    def _open(self) -> None:
        o, in_chans = self._options, self._options.encoder().in_chans
        how: dict[str, Any] = {"val_fraction": o.val_fraction, "seed": o.seed}
        how["wanted"] = replace(wanted_of(self._training.source), max_pixels=o.max_pixels, least_side=None)
        how |= {"mean": self._training.mean, "std": self._training.std}
        training, validation = build_finetune_datasets(o.probe_data, o.size, in_chans, **how)
        self._parts = [label_fraction(training, 1.0, o.seed), validation]  # as fcmae evaluate takes them

    def _features(self, encoder: Encoder, device: torch.device, say: Say) -> list[Features]:
        first = not self._images
        if first:
            say(f"probes: {'; '.join(part.description for part in self._parts)}")
            self._images = [(PlainDataset(part), Kept(KEPT_BYTES)) for part in self._parts]
        network, workers = snapshot(encoder), None if self._options.workers else 0
        left = math.inf if self._options.probe_every is not None else self._budget.left
        end = time.perf_counter() + left
        found = [
            extract_features(network, images, device=device, workers=workers, progress=partial(until, end, kept))
            for images, kept in self._images
        ]
        left_out = [one for part in self._parts for one in part.skipped]
        left_out += [one for features in found for one in features.unreadable]
        if first and (lines := describe_skipped(left_out)):
            say(f"{lines[0]} {'; '.join(lines[1:])}")
        return found

    def _draw(self, encoder: Encoder, epoch: int) -> None:
        """Draw neighbours among the images that are trained on, if probes leave time, and after the last epoch in any
        case."""
        images, o = self._training, self._options
        count = sample_size(len(images), (len(images.mean), *o.size))
        cost = self._budget.picture or self._image * count
        certain = epoch == o.epochs or o.probe_every is not None
        probe = self._budget.features or self._image * UNSEEN * len(images)
        last = cost + (probe + self._budget.linear if self._probes else 0)
        if count < 2 or not (certain or self._budget.allows(cost, last, epoch / o.epochs)):
            return
        with self._spending() as seconds:
            if self._examples is None:
                self._examples = images.examples(count)
            features = features_of(snapshot(encoder), self._examples)
            place = Path(o.output) / "neighbours.png"
            mean, std = shown_statistics(images)
            save_neighbours(place, self._examples, features, mean=mean, std=std)
        self._budget.picture = seconds[0]


def may_be_labelled(data: str) -> bool:
    """Whether a source may have labels: a folder has class folders, or holds them in ``train`` and ``val``."""
    folder = Path(data)
    if not folder.is_dir():
        return True
    parted = (folder / "train").is_dir() and (folder / "val").is_dir()
    inside = (folder / "train" if parted else folder).iterdir()
    return sum(path.is_dir() and not path.name.startswith(".") for path in inside) > 1


class ProbedTask(Task[O]):
    """A task whose network has an ``encoder`` that is probed."""

    def resolve(self, saved: dict[str, Any] | None) -> None:
        self._saved = None if saved is None else saved.get("probing")

    def probed(self, images: ImageDataset) -> list[ImageDataset]:
        """The data of the task, ``images``, which are looked at for labels."""
        self._probing = Probing(self.options, images, self._saved)
        self.progress["probing"] = self._probing.state
        return [images]

    def after_epoch(self, accelerator: Accelerator, model: Any, row: dict[str, Any], say: Say) -> dict[str, float]:
        draws = row["epoch"] in (*self.picture_epochs, self.options.epochs)
        found = self._probing.after_epoch(accelerator, model.encoder, row, say, draws)
        self.progress["probing"] = self._probing.state
        return found

    def line(self, row: dict[str, Any]) -> str:
        probe = f", {self._probing.last}" if self._probing.last else ""
        return f"{super().line(row)}, feature diversity {row['feature_diversity']:.3f}{probe}"

"""A part of a study: one training, or one look at frozen features, known by everything that determines its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from convnextv2.training import FinetuneOptions, PretrainOptions
from convnextv2.training.feeding import passes_for
from studies.images import count_images, fingerprint, spec_of

FREE = ("workers", "device", "tracker", "max_bad", "reconstruct_every")
"""Options that leave the numbers as they are, to rounding."""
RESERVED = (
    "data",
    "output",
    "init",
    "resume",
    "overwrite",
    "seed",
    "val_fraction",
    "linear_probe",
    "probe",
    "probe_every",
)
"""Options that the study itself sets."""
LATER = {"pretrain": ("crop_scale", "hflip")}
"""Options that came after results that are kept; left open, they leave those what they are."""
ENCODER = ("model", "depths", "dims", "patch_size", "in_chans", "img_size")
READING = ("pixels", "bands", "no_data", "value_range", "window", "crop", "augment", "max_pixels", "reduce_jpeg")
"""How images are read; of an untrained network's looks, which are older, they count where they are not the usual."""
FROZEN = ("knn", "linear")


@dataclass(frozen=True, eq=False)
class Part:
    """What is done once, however many tables it is for.

    Args:
        kind: pretrain, finetune, or a measure of frozen features.
        seed: of the run, and of the labels that are drawn.
        given: options of the run; for frozen features those of the pre-training, of which the encoder's count.
        data: what the user named.
        images: what is taken of it, for :func:`~studies.images.spec_of`.
        variant: of :mod:`studies.variants`.
        needs: the pre-training that this starts from; none is from scratch, or untrained.
    """

    kind: str
    seed: int
    given: Mapping[str, Any]
    data: str
    images: Mapping[str, Any]
    variant: str | None = None
    needs: Part | None = None

    def options(self, folder: Path | None = None, **free: Any) -> PretrainOptions | FinetuneOptions:
        """Options of its run, in the folder of a study if there is one; ValueError, TypeError if they are wrong."""
        places: dict[str, Any] = {"data": spec_of(self.data, self.images), "output": "unknown", "resume": "auto"}
        if folder is not None:
            places |= {"output": self.run(folder), "init": self.needs and self.needs.run(folder)}
        kind = FinetuneOptions if self.kind == "finetune" else PretrainOptions
        free |= {"probe": "none"} if kind is PretrainOptions else {}  # a study has probes of its own
        options = kind(**{**self.given, **free, **places, "seed": self.seed})
        options.check()
        return options

    def place(self, folder: Path) -> Path:
        """Its own folder, which is held while it is worked on."""
        return folder / "parts" / f"{self.kind}-{self.key}"

    def run(self, folder: Path) -> Path:
        """The folder of its run."""
        return self.place(folder) / "run"

    @property
    def work(self) -> float:
        """How long it takes, in a unit of its kind: passes over the data."""
        epochs = self.options().epochs if self.kind not in FROZEN else 1
        return float(epochs * self.images.get("labels", 1))

    @property
    def passes(self) -> int:
        """How often a fine-tuning goes through its images, in all its epochs."""
        o: Any = self.options()
        images = 1 if not o.min_steps else count_images(o.data, o.encoder().in_chans, o.size, o.wanted)
        return int(o.epochs * passes_for(None, o.min_steps, images, o, 1))

    @cached_property
    def determined_by(self) -> dict[str, Any]:
        """Everything that the numbers follow from, but for the code and the machine."""
        values = asdict(self.options())
        cached = {"cache": True} if values["cache"] and self.kind not in FROZEN else {}  # images are smaller there
        if self.kind in FROZEN:
            unusual = (name for name in READING if values[name] != getattr(PretrainOptions, name))
            names = {*ENCODER, *unusual} if self.needs is None else set[str]()
        else:
            open_since = {name for name in LATER.get(self.kind, ()) if values[name] is None}
            names = set(values) - {*FREE, *RESERVED, "cache", *open_since}
        return {
            "kind": self.kind,
            "seed": self.seed,
            "options": {name: values[name] for name in sorted(names)} | cached,
            "data": fingerprint(self.data),
            "images": dict(self.images),
            "variant": self.variant,
            "needs": self.needs and self.needs.key,
        }

    @cached_property
    def key(self) -> str:
        """A hash of :attr:`determined_by`, in which 1 and 1.0 are the same."""
        plain = json.loads(json.dumps(self.determined_by), parse_int=float)
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        share = f", {100 * self.images['labels']:g}% of the labels" if "labels" in self.images else ""
        variant = f", {self.variant}" if self.variant else ""
        return f"{self.kind} {self.key[:6]} (seed {self.seed}{share}{variant})"

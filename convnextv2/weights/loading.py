"""Weights into networks: a classifier or a masked autoencoder started from a checkpoint, and whole networks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import EncoderConfig, FCMAEConfig
from convnextv2.models.fcmae import FCMAE
from convnextv2.weights.adapting import read_for
from convnextv2.weights.beside import class_names_of
from convnextv2.weights.checkpoint import Checkpoint, CheckpointError, as_checkpoint, load_checkpoint
from convnextv2.weights.layout import DECODER_PARTS, HEAD_PARTS, part_of
from convnextv2.weights.reading import read_checkpoint, weights_config, write_layout
from sparse_ops.registry import get_backend


def load_strict(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """``model.load_state_dict(state, strict=True)``, but that names or shapes that differ are a CheckpointError of one
    line, which names the first few."""
    own = model.state_dict()
    shapes = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in own.keys() & state.keys()}
    different = {f"{name} {given} instead of {known}" for name, (given, known) in shapes.items() if given != known}
    kinds = {"missing": own.keys() - state, "unexpected": state.keys() - own, "of another shape": different}
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''}"
        for what, names in kinds.items()
        if names
    ]
    if problems:
        raise CheckpointError(f"{path}: does not fit the network: {'; '.join(problems)}")
    model.load_state_dict(dict(state))


def load_model(
    path: str | os.PathLike[str], backend: str = "auto", device: torch.device | str = "cpu"
) -> FCMAE | ConvNeXtV2:
    """The network of a checkpoint, rebuilt from the configuration in the file, all weights loaded strictly.

    Args:
        path: as :func:`load_checkpoint`. Files of other projects work where their weights make a whole network: a
            classifier, or a masked autoencoder with its decoder.
        backend: of the sparse blocks of a masked autoencoder, or of a classifier on a processor: auto, torch, cpu.

    Raises:
        ValueError: if the backend named has no kernels for a classifier.
        CheckpointError: if the file cannot be read, does not fit its configuration, or holds an encoder alone.
        BackendUnavailableError: if the backend named cannot run here.
    """
    return complete_model(load_checkpoint(path), backend).to(device)


@dataclass(frozen=True)
class LoadReport:
    """What :func:`init_classifier` did, by names of the dense network."""

    path: Path
    loaded: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]
    note: str = ""

    def __str__(self) -> str:
        def parts(names: tuple[str, ...]) -> str:
            return ", ".join(dict.fromkeys(name.split(".")[0] for name in names)) or "nothing"

        return (
            f"{self.path}: {len(self.loaded)} tensors loaded; dropped: {parts(self.dropped)}; "
            f"freshly initialised: {parts(self.new)}{self.note and '; '}{self.note}"
        )


def init_classifier(model: ConvNeXtV2, checkpoint: Checkpoint | str | Path, *, bands: str | None = None) -> LoadReport:
    """Start a classifier from the weights of a checkpoint of any layout.

    The whole encoder must be there. The final norm and the head may be missing and then keep their initial values; a
    head with another number of classes or with classes of other names, a decoder and a mask token are dropped. A stem
    for other channels or another patch size is adapted, as :func:`~convnextv2.weights.adapting.read_for` does, which
    also takes ``bands``. Raises CheckpointError if the file cannot be read, or is of another variant: both are named.
    """
    checkpoint = as_checkpoint(checkpoint)
    weights, adapted = read_for(model.encoder_config, checkpoint, bands)
    target = model.state_dict()
    loaded = {name: own for name, own in weights if name in target and target[name].shape == own.shape}
    notes = [adapted] if adapted else []
    if "head.weight" in loaded:
        there = getattr(checkpoint.config, "class_names", ()) or class_names_of(checkpoint.metadata)
        here = model.config.class_names
        if there and here and there != here:
            loaded = {name: own for name, own in loaded.items() if not name.startswith("head.")}
            other = "the same classes in another order" if sorted(there) == sorted(here) else "classes of other names"
            notes.append(f"the head there is of {other}")
        elif not (here and there):
            nameless = "the network" if there else "the file"
            notes.append(
                f"the head is kept for its {model.config.num_classes} outputs; {nameless} does not name its classes"
            )
    else:
        loaded.pop("head.bias", None)  # of a head as large that is given other features
    dropped = tuple(name for name, _ in weights if name not in loaded)
    assert all(name.split(".")[0] in (*DECODER_PARTS, *HEAD_PARTS) for name in dropped)
    load_strict(model, {**target, **loaded}, checkpoint.path)
    new = tuple(name for name in target if name not in loaded)
    return LoadReport(checkpoint.path, tuple(loaded), dropped, new, "; ".join(notes))


def init_fcmae(model: FCMAE, checkpoint: Checkpoint | str | Path, *, bands: str | None = None) -> str:
    """Start a masked autoencoder from the weights of a checkpoint of any layout; what was loaded and is new, in words.

    The whole encoder must be there. The decoder is taken where there is one of the same shape; where the stem was
    adapted, without its last layer. Adapts, takes ``bands`` and raises as :func:`init_classifier`.
    """
    checkpoint = as_checkpoint(checkpoint)
    weights, adapted = read_for(model.config.encoder, checkpoint, bands)
    state, decoder = model.state_dict(), weights.decoder
    wanted = {name for name in state if part_of(name) == "decoder" and not (adapted and name.startswith("pred."))}
    fits = decoder.keys() == wanted and all(state[name].shape == value.shape for name, value in decoder.items())
    taken = write_layout(weights if fits else replace(weights, decoder={}), "fcmae")
    load_strict(model, {**state, **taken}, checkpoint.path)
    new = "the decoder" if not fits else "the decoder's last layer" if adapted else "nothing"
    note = f"; {adapted}" if adapted else ""
    return f"{checkpoint.path}: {len(taken)} tensors loaded; {new} is freshly initialised{note}"


def complete_model(checkpoint: Checkpoint, backend: str = "auto") -> FCMAE | ConvNeXtV2:
    """The network of a checkpoint that holds all of it; raises as :func:`load_model`."""
    weights = read_checkpoint(checkpoint)
    config = weights_config(weights) if checkpoint.config is None else checkpoint.config
    if isinstance(config, EncoderConfig):
        raise CheckpointError(
            f"{checkpoint.path}: holds an encoder without decoder and without head, so it is no whole network; "
            "start a fine-tuning from it instead"
        )
    if isinstance(config, FCMAEConfig) and backend != "auto":
        get_backend(backend)
    model = FCMAE(config, backend) if isinstance(config, FCMAEConfig) else ConvNeXtV2(config, backend)
    layout = "fcmae" if isinstance(model, FCMAE) else "official-dense"
    load_strict(model, write_layout(weights, layout), checkpoint.path)
    return model

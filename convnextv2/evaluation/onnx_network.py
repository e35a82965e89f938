"""An encoder in an ONNX file, run by onnxruntime as a network that prediction takes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convnextv2.data.transforms import Preprocessing, preprocessing_from_metadata
from convnextv2.messages import one_line
from convnextv2.weights.guard import CheckpointError

FEATURES = "features"
"""The output that is an encoder's."""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxNetwork(nn.Module):
    """Features of images ``[B, C, H, W]`` by a session of onnxruntime.

    ``maps`` says whether they are ``[B, D, h, w]``; else they are ``[B, D]``. Its one parameter, of no numbers, says
    where it runs. A file of a fixed batch is given as many images at a time, the last filled up with zeros.
    """

    def __init__(self, session: Any, output: str, path: Path, device: torch.device) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self._session, self._output, self._path = session, output, path
        (entry,) = session.get_inputs()
        self._input = entry.name
        self._batch = entry.shape[0] if isinstance(entry.shape[0], int) else None
        self.channels: int = entry.shape[1]
        height, width = (side if isinstance(side, int) else None for side in entry.shape[2:])
        self.size = height, width
        self.maps = len(_shapes(session)[output]) == 4

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self._run(part) for part in images.split(self._batch or max(1, len(images)))])

    def _run(self, images: Tensor) -> Tensor:
        count, device = len(images), images.device
        if self._batch is not None and count < self._batch:
            images = torch.cat([images, images.new_zeros(self._batch - count, *images.shape[1:])])
        try:
            (found,) = self._session.run([self._output], {self._input: images.cpu().contiguous().numpy()})
        except Exception as error:  # onnxruntime's have no class of their own that is public
            raise CheckpointError(f"{self._path}: onnxruntime cannot run it: {one_line(error)}") from error
        return torch.from_numpy(found).to(device)[:count]


@dataclass(frozen=True)
class OnnxEncoder:
    """The network of a file, how its images are prepared: mean, std, (H, W); and all that the file says of them."""

    network: OnnxNetwork
    preprocessing: Preprocessing
    metadata: Mapping[str, Any] = field(default_factory=dict)


def load_onnx(
    path: Path, *, device: str | torch.device = "cpu", img_size: tuple[int, int] | None = None
) -> OnnxEncoder:
    """The encoder of an ONNX file: one input of images, and an output called ``features``, or a feature map alone.

    Mean, standard deviation and image size are the file's metadata, as ``fcmae convert`` writes
    them; ImageNet's and 224×224 (or the size that the file is fixed to) where it has none.

    Raises:
        CheckpointError: if it cannot be opened, gives a classifier's logits, takes something else than images, or
            says of them what cannot be.
        ValueError: if onnxruntime is missing or cannot run on the device, or the file is of another image size.
    """
    device = torch.device(device)
    session = _session(path, device)
    _check_input(session, path)
    network = OnnxNetwork(session, _output(session, path), path, device)
    height, width = network.size
    fixed = (224, 224) if height is None or width is None else (height, width)
    try:
        metadata = {name: _plain(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
        mean, std, own = preprocessing_from_metadata(metadata, network.channels, fixed)
    except ValueError as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from error
    size = img_size or own
    if any(side not in (None, wanted) for side, wanted in zip(network.size, size, strict=True)):
        told = "×".join(str(side or "any") for side in network.size)
        raise ValueError(f"{path}: takes images of {told} pixels, not of {size[0]}×{size[1]}; say its size")
    return OnnxEncoder(network, (mean, std, size), metadata)


def _plain(text: str) -> Any:
    """A value that was written as JSON; the text of other programs as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _session(path: Path, device: torch.device) -> Any:
    if importlib.util.find_spec("onnxruntime") is None:
        raise ValueError("an ONNX file needs onnxruntime; install with: pip install onnxruntime")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    import onnxruntime

    provider = PROVIDERS.get(device.type)
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(f"{path}: the onnxruntime that is installed cannot run on {device}; choose the device cpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    chosen: Any = (provider, {"device_id": device.index or 0}) if device.type == "cuda" else provider
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[chosen])
    except Exception as error:  # as above
        raise CheckpointError(f"{path}: onnxruntime cannot open it: {one_line(error)}") from error


def _shapes(session: Any) -> dict[str, list[Any]]:
    return {entry.name: list(entry.shape or ()) for entry in session.get_outputs()}


def _check_input(session: Any, path: Path) -> None:
    found = [f"{entry.name} {entry.shape} {entry.type}" for entry in session.get_inputs()]
    entries = session.get_inputs()
    good = len(entries) == 1 and len(entries[0].shape or ()) == 4 and entries[0].type == "tensor(float)"
    if not good or not isinstance(entries[0].shape[1], int):
        raise CheckpointError(
            f"{path}: expected one input, images [batch, channels, height, width] of float32 with a fixed number of "
            f"channels, got {one_line(', '.join(found)) or 'none'}"
        )


def _output(session: Any, path: Path) -> str:
    shapes = _shapes(session)
    if FEATURES in shapes and len(shapes[FEATURES]) in (2, 4):
        return FEATURES
    gives = one_line(", ".join(f"{name} {shape}" for name, shape in shapes.items()))
    if "logits" in shapes:
        raise CheckpointError(
            f"{path}: gives {gives}, a classifier's answers, and no features; give the checkpoint that it was made from"
        )
    if len(shapes) == 1 and len(shapes[only := next(iter(shapes))]) == 4:
        return only
    raise CheckpointError(f"{path}: expected an output called {FEATURES!r} [B, D] or [B, D, h, w], got {gives}")

"""A network as an ONNX file with free batch, height and width, through torch's exporter."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnextv2.export.refusal import ExportError
from convnextv2.export.source import MARK, Run, Source

LARGEST = 2**31
"""Bytes that a file of ONNX, which is one message of protobuf, may have."""


def program(source: Source) -> Any:
    """Torch's ``ONNXProgram``, of standard operators alone; ``images`` ``[batch, C, height, width]`` go in."""
    config = source.network.encoder_config
    images = torch.zeros(2, config.in_chans, 2 * config.patch_size, 3 * config.patch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        result = torch.onnx.export(
            source.network,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
            input_names=["images"],
            output_names=[source.output],
            verbose=False,
        )
    assert result is not None
    return result


def write(source: Source, path: Path) -> Run:
    """Write the file and open it in onnxruntime; ExportError if the weights are too large for one file."""
    size = sum(value.numel() * value.element_size() for value in source.network.state_dict().values())
    if size >= LARGEST:
        raise ExportError(
            f"{size / 2**30:.1f} GB of weights, and a file of ONNX holds less than 2 GB; use the target torch-export"
        )
    result = program(source)
    result.model.producer_name = MARK
    result.model.metadata_props.update({key: json.dumps(value) for key, value in source.about().items()})
    result.save(path)
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run


def is_one(path: Path) -> bool:
    """Whether a file is ONNX that was written here: the producer stands at its start."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(64)


def loading(source: Source, path: str) -> list[str]:
    """How the file is run."""
    call = f"session.run([{source.output!r}], {{'images': images}})"
    return [f"load it with: session = onnxruntime.InferenceSession({path!r}); {call}, which gives {source.gives}"]

"""The formats, and where what writes each of them lies."""

from __future__ import annotations

from convnextv2.deferred import later
from convnextv2.export.target import Target

_ALL = (
    Target(
        name="onnx",
        about="ONNX for onnxruntime and others, of any batch and image size",
        layout="official-dense",
        suffixes=(".onnx",),
        packages=("onnx", "onnxscript", "onnxruntime"),
        write=later("convnextv2.export.onnx", "write"),
        is_one=later("convnextv2.export.onnx", "is_one"),
        loading=later("convnextv2.export.onnx", "loading"),
    ),
    Target(
        name="torch-export",
        about="a program that runs where torch is, without this package",
        layout="official-dense",
        suffixes=(".pt2",),
        write=later("convnextv2.export.torch_export", "write"),
        is_one=later("convnextv2.export.torch_export", "is_one"),
        loading=later("convnextv2.export.torch_export", "loading"),
    ),
    Target(
        name="transformers",
        about="a folder for from_pretrained, with the image processor",
        layout="transformers",
        suffixes=(),
        packages=("transformers",),
        write=later("convnextv2.export.transformers", "write"),
        is_one=later("convnextv2.export.transformers", "is_one"),
        loading=later("convnextv2.export.transformers", "loading"),
    ),
)
TARGETS = {target.name: target for target in _ALL}
"""The formats by name."""

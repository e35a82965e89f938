"""The formats, and where what writes each of them lies."""

from __future__ import annotations

from typing import Any

from convnextv2.deferred import later
from convnextv2.export.target import Target


def _functions(module: str) -> dict[str, Any]:
    """What a format is but for words, from its module, which is imported when one of them is called."""
    return {name: later(f"convnextv2.export.{module}", name) for name in ("write", "is_one", "loading")}


_ALL = (
    Target(
        name="onnx",
        about="ONNX for onnxruntime and others, of any batch and image size",
        layout="official-dense",
        suffixes=(".onnx",),
        packages=("onnx", "onnxscript", "onnxruntime"),
        **_functions("onnx"),
    ),
    Target(
        name="torch-export",
        about="a program that runs where torch is, without this package",
        layout="official-dense",
        suffixes=(".pt2",),
        **_functions("torch_export"),
    ),
    Target(
        name="transformers",
        about="a folder for from_pretrained, with the image processor",
        layout="transformers",
        suffixes=(),
        packages=("transformers",),
        **_functions("transformers"),
    ),
)
TARGETS = {target.name: target for target in _ALL}
"""The formats by name."""

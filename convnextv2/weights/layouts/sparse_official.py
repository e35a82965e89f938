"""The sparse encoder of the official pre-training, with MinkowskiEngine's names and shapes, and its decoder.

MinkowskiEngine numbers the taps of a kernel with the first spatial axis (rows) fastest, so its ``[K², C]`` depthwise
kernel reshapes to ``[C, 1, x, y]`` and its last two axes have to be swapped.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from convnextv2.deferred import later
from convnextv2.models.config import EncoderConfig
from convnextv2.weights.guard import CheckpointError
from convnextv2.weights.layout import Layout, read_plainly

if TYPE_CHECKING:
    from torch import Tensor


def _kind(name: str) -> str | None:
    """Kind of a convolution by our name of its weight, whose rank does not tell, or of its bias."""
    found = re.match(r"(stages\.\d+\.\d+\.(dw|pw)conv\d?|downsample_layers\.[1-9]\.1)\.(?:weight|bias)$", name)
    return {"dw": "depthwise", "pw": "pointwise", None: "downsample"}[found[2]] if found else None


def taps_to_map(kernel: Tensor) -> Tensor:
    """Kernel with its taps along the first axis, rows fastest, as ``[y, x]`` in the last two axes.

    ``[K², C]`` becomes ``[C, K, K]``, and ``[K², Cin, Cout]`` ``[Cout, Cin, K, K]``. Raises CheckpointError if the
    number of taps is not a square.
    """
    side = math.isqrt(kernel.shape[0])
    if side * side != kernel.shape[0]:
        raise CheckpointError(f"a kernel has {kernel.shape[0]} taps, which is not a square")
    return kernel.transpose(0, -1).unflatten(-1, (side, side)).transpose(-1, -2).contiguous()


def map_to_taps(weight: Tensor) -> Tensor:
    """Inverse of :func:`taps_to_map`."""
    return weight.transpose(-1, -2).flatten(-2).transpose(0, -1).contiguous()


def _read(name: str, source: str, tensor: Tensor) -> Tensor:
    kind = _kind(name)
    if kind is not None and name.endswith(".bias"):
        return tensor.flatten()
    if kind is None or not source.endswith(".kernel"):
        return read_plainly(name, source, tensor)
    axes = 3 if kind == "downsample" else 2
    if tensor.dim() != axes:
        raise CheckpointError(f"{source}: a {kind} kernel has {axes} axes, this one {list(tensor.shape)}")
    if kind == "pointwise":
        return tensor.t().contiguous()
    return taps_to_map(tensor).unsqueeze(1) if kind == "depthwise" else taps_to_map(tensor)


def _write(name: str, tensor: Tensor, config: EncoderConfig) -> Tensor:
    if name.startswith("stages.") and ".grn." in name:
        return tensor.view(1, -1)
    kind = _kind(name)
    if kind is None or kind == "pointwise":
        return tensor
    if name.endswith(".bias"):
        return tensor[None]
    return map_to_taps(tensor.squeeze(1) if kind == "depthwise" else tensor)


LAYOUT = Layout(
    name="sparse-official",
    about="the MinkowskiEngine layout of the official pre-training, with the decoder if the source has it",
    recognises=lambda names: any(re.match(r"(encoder\.)?stages\..*\.dwconv\.kernel$", name) for name in names),
    names=(
        (r"^(stages|downsample_layers)\.", r"encoder.\1."),
        (r"^(encoder\..*)\.dwconv\.weight$", r"\1.dwconv.kernel"),
        (r"^(encoder\.downsample_layers\.[1-9])\.1\.weight$", r"\1.1.kernel"),
        (r"^(encoder\.downsample_layers\.[1-9])\.0\.", r"\1.0.ln."),
        (r"^(encoder\..*)\.norm\.", r"\1.norm.ln."),
        (r"^(encoder\..*\.pwconv[12])\.", r"\1.linear."),
    ),
    spellings=(
        (r"\.(pwconv[12])\.kernel$", r".\1.linear.weight"),
        (r"^(?!decoder\.)(.*\.pwconv[12])\.bias$", r"\1.linear.bias"),
        (r"^(stages|downsample_layers)\.", r"encoder.\1."),
    ),
    parts=("encoder", "decoder"),
    target=True,
    read=_read,
    write=_write,
    sparse_features=later("convnextv2.weights.evaluators", "official_sparse_features"),
    loading=later("convnextv2.weights.loaders", "official_loading"),
)

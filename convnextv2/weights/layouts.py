"""Foreign weights to ours and back: the one place that knows names, shapes and tap order of other projects.

Every layout is read into :class:`Weights`, whose names and shapes are those of the official dense network (which are
ours), and written from it. One table of names a layout serves both directions.

MinkowskiEngine numbers the taps of a kernel with the first spatial axis (rows) fastest, so its ``[K², C]`` depthwise
kernel reshapes to ``[C, 1, x, y]`` and its last two axes have to be swapped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Literal

from torch import Tensor

from convnextv2.models.config import NUM_STAGES
from convnextv2.weights.checkpoint import CheckpointError

Layout = Literal["official-dense", "fcmae", "sparse-official", "timm", "transformers"]


LAYOUTS: tuple[Layout, ...] = ("official-dense", "fcmae", "sparse-official", "timm", "transformers")
"""``fcmae`` is our masked autoencoder: dense kernels below ``encoder.``, and the decoder."""


DECODER_PARTS = ("mask_token", "proj", "decoder", "pred")


HEAD_PARTS = ("norm", "head")


_BLOCK = tuple(f"{layer}.{part}" for layer in ("dwconv", "norm", "pwconv1", "pwconv2") for part in ("weight", "bias"))


BLOCK_NAMES = (*_BLOCK, "grn.gamma", "grn.beta")


_TIMM_BLOCK = {"dwconv": "conv_dw", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}


_GRN = {"grn.gamma": "grn.weight", "grn.beta": "grn.bias"}


_EMBEDDINGS = {"0": "patch_embeddings", "1": "layernorm"}


def foreign_name(name: str, layout: Layout) -> str:
    """The name in ``layout`` of a tensor of the dense network, of its head, or of the decoder."""
    first, *rest = name.split(".")
    if first in DECODER_PARTS or layout == "official-dense":
        return name
    if layout == "fcmae":
        return name if first in HEAD_PARTS else f"encoder.{name}"
    if layout == "timm":
        return _timm_name(first, rest)
    if layout == "transformers":
        return _transformers_name(first, rest)
    return name if first in HEAD_PARTS else f"encoder.{_sparse_name(name)}"


def _timm_name(first: str, rest: list[str]) -> str:
    if first in HEAD_PARTS:
        return ".".join(("head", {"norm": "norm", "head": "fc"}[first], *rest))
    if first == "downsample_layers":
        place = ("stem",) if rest[0] == "0" else ("stages", rest[0], "downsample")
        return ".".join((*place, *rest[1:]))
    stage, block, *tail = rest
    layer = _GRN.get(".".join(tail))
    local = f"mlp.{layer}" if layer else ".".join((_TIMM_BLOCK.get(tail[0], tail[0]), *tail[1:]))
    return f"stages.{stage}.blocks.{block}.{local}"


def _transformers_name(first: str, rest: list[str]) -> str:
    if first in HEAD_PARTS:
        return ".".join(({"norm": "convnextv2.layernorm", "head": "classifier"}[first], *rest))
    if first == "downsample_layers":
        if rest[0] == "0":
            return f"convnextv2.embeddings.{_EMBEDDINGS[rest[1]]}.{rest[2]}"
        return ".".join(("convnextv2.encoder.stages", rest[0], "downsampling_layer", *rest[1:]))
    stage, block, *tail = rest
    local = ".".join(tail)
    local = _GRN.get(local, re.sub(r"^norm\.", "layernorm.", local))
    return f"convnextv2.encoder.stages.{stage}.layers.{block}.{local}"


def _sparse_name(name: str) -> str:
    name = re.sub(r"\.dwconv\.weight$", ".dwconv.kernel", name)
    name = re.sub(r"^(downsample_layers\.[1-9])\.1\.weight$", r"\1.1.kernel", name)
    name = re.sub(r"^(downsample_layers\.[1-9])\.0\.", r"\1.0.ln.", name)
    name = re.sub(r"\.norm\.(weight|bias)$", r".norm.ln.\1", name)
    return re.sub(r"\.(pwconv[12])\.", r".\1.linear.", name)


def _known_names(blocks: int) -> Iterator[str]:
    """Every name of the dense network, its head and the decoder, with up to ``blocks`` blocks a stage."""
    ends = ("weight", "bias")
    yield from (f"downsample_layers.{i}.{j}.{end}" for i in range(NUM_STAGES) for j in (0, 1) for end in ends)
    yield from (f"stages.{i}.{j}.{end}" for i in range(NUM_STAGES) for j in range(blocks) for end in BLOCK_NAMES)
    yield from (f"decoder.{j}.{end}" for j in range(blocks) for end in BLOCK_NAMES)
    yield from (f"{part}.{end}" for part in (*HEAD_PARTS, "proj", "pred") for end in ends)
    yield "mask_token"


def _lookup_name(name: str, layout: Layout) -> str:
    """A name as :func:`foreign_name` writes it, from the spellings a layout occurs in."""
    if layout == "sparse-official":
        name = re.sub(r"\.(pwconv[12])\.kernel$", r".\1.linear.weight", name)
        name = re.sub(r"\.(pwconv[12])\.bias$", r".\1.linear.bias", name) if not name.startswith("decoder.") else name
        return f"encoder.{name}" if re.match(r"(stages|downsample_layers)\.", name) else name
    if layout == "transformers":
        if re.match(r"(embeddings|encoder|layernorm)\.", name):
            name = f"convnextv2.{name}"
        name = re.sub(r"\.grn\.gamma$", ".grn.weight", name)
        return re.sub(r"\.grn\.beta$", ".grn.bias", name)
    return name


def detect_layout(state_dict: Mapping[str, Tensor]) -> Layout:
    """Which layout the names of a state dict follow.

    Raises:
        CheckpointError: if it is none of ConvNeXt V2's.
    """
    names = set(state_dict)
    if any(re.search(r"\.dwconv\.kernel$", name) for name in names):
        return "sparse-official"
    if any(name.removeprefix("convnextv2.") == "embeddings.patch_embeddings.weight" for name in names):
        return "transformers"
    if "encoder.downsample_layers.0.0.weight" in names:
        return "fcmae"
    if "downsample_layers.0.0.weight" in names:
        return "official-dense"
    if "stem.0.weight" in names and any(name.startswith("stages.0.blocks.0.conv_dw.") for name in names):
        return "timm"
    raise CheckpointError(
        f"not the weights of a ConvNeXt V2: none of the layouts {', '.join(LAYOUTS)} has names like "
        f"{', '.join(sorted(names)[:3])}"
    )


def _is_kernel(name: str) -> Literal["depthwise", "downsample", None]:
    """Kind of a MinkowskiEngine kernel by the name it has in the dense network; its rank does not tell."""
    if re.match(r"stages\.\d+\.\d+\.dwconv\.weight$", name):
        return "depthwise"
    return "downsample" if re.match(r"downsample_layers\.[1-9]\.1\.weight$", name) else None


def _is_sparse_bias(name: str) -> bool:
    return bool(re.match(r"(stages\.\d+\.\d+\.(dwconv|pwconv\d)|downsample_layers\.[1-9]\.1)\.bias$", name))


def taps_to_map(kernel: Tensor) -> Tensor:
    """Kernel with its taps along the first axis, rows fastest, as ``[y, x]`` in the last two axes.

    Args:
        kernel: ``[K², C]`` or ``[K², Cin, Cout]``.

    Returns:
        ``[C, K, K]`` or ``[Cout, Cin, K, K]``.

    Raises:
        CheckpointError: if the number of taps is not a square.
    """
    side = math.isqrt(kernel.shape[0])
    if side * side != kernel.shape[0]:
        raise CheckpointError(f"a kernel has {kernel.shape[0]} taps, which is not a square")
    axes = tuple(reversed(range(kernel.dim())))
    return kernel.permute(axes).unflatten(-1, (side, side)).transpose(-1, -2).contiguous()


def map_to_taps(weight: Tensor) -> Tensor:
    """Inverse of :func:`taps_to_map`."""
    flat = weight.transpose(-1, -2).flatten(-2)
    return flat.permute(tuple(reversed(range(flat.dim())))).contiguous()


def _from_foreign(name: str, source_name: str, tensor: Tensor, layout: Layout) -> Tensor:
    if name.startswith("stages.") and ".grn." in name:
        return tensor.reshape(1, 1, 1, -1)
    if layout == "sparse-official":
        kind = _is_kernel(name)
        if kind is not None:
            rank = {"depthwise": 2, "downsample": 3}[kind]
            if tensor.dim() != rank:
                raise CheckpointError(f"{source_name}: a {kind} kernel has {rank} axes, this one {list(tensor.shape)}")
            return taps_to_map(tensor).unsqueeze(1) if kind == "depthwise" else taps_to_map(tensor)
        if source_name.endswith(".kernel"):
            return tensor.t().contiguous()
        return tensor.flatten() if _is_sparse_bias(name) else tensor
    if re.search(r"\.pwconv[12]\.weight$", name) and tensor.dim() == 4:
        return tensor.flatten(1)
    return tensor


def _to_foreign(name: str, tensor: Tensor, layout: Layout) -> Tensor:
    if layout == "timm" and ".grn." in name:
        return tensor.flatten()
    if layout == "sparse-official":
        kind = _is_kernel(name)
        if kind is not None:
            return map_to_taps(tensor.squeeze(1) if kind == "depthwise" else tensor)
        if name.startswith("stages.") and ".grn." in name:
            return tensor.view(1, -1)
        if _is_sparse_bias(name) and ".pwconv" not in name:
            return tensor[None]
    return tensor

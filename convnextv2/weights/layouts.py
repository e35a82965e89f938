"""Foreign weights to ours and back: the one place that knows names, shapes and tap order of other projects.

Every layout is read into :class:`Weights`, whose names and shapes are those of the official dense network (which are
ours), and written from it. One table of names a layout serves both directions.

MinkowskiEngine numbers the taps of a kernel with the first spatial axis (rows) fastest, so its ``[K², C]`` depthwise
kernel reshapes to ``[C, 1, x, y]`` and its last two axes have to be swapped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from convnextv2.checkpoint import Checkpoint, CheckpointError, Config, load_checkpoint, load_strict
from convnextv2.classifier import ConvNeXtV2
from convnextv2.config import NUM_STAGES, ClassifierConfig, EncoderConfig, FCMAEConfig, variant_name
from convnextv2.encoder import Encoder
from convnextv2.fcmae import FCMAE
from sparse_ops.backend import get_backend

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


@dataclass(frozen=True)
class Weights:
    """Weights in the names and shapes of the official dense network, whatever layout they came in.

    Args:
        layout: the layout they were read from.
        config: the encoder's shape, read from the weights.
        encoder: stem, downsampling and stages; complete.
        decoder: mask token, projection, decoder and prediction of a masked autoencoder; complete or empty.
        head: final norm and head of a classifier: both, the norm alone, or empty.
        names: for each name here, the name in the source.
        widened: whether 16-bit weights were widened to float32.
    """

    layout: Layout
    config: EncoderConfig
    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    head: dict[str, Tensor]
    names: dict[str, str]
    widened: bool = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for group in (self.encoder, self.decoder, self.head):
            yield from group.items()

    @property
    def num_classes(self) -> int | None:
        """Outputs of the head, or None without one."""
        return self.head["head.weight"].shape[0] if "head.weight" in self.head else None


@dataclass(frozen=True)
class LoadReport:
    """What :func:`init_classifier` did, by names of the dense network."""

    path: Path
    loaded: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        def parts(names: tuple[str, ...]) -> str:
            return ", ".join(dict.fromkeys(name.split(".")[0] for name in names)) or "nothing"

        return (
            f"{self.path}: {len(self.loaded)} tensors loaded; dropped: {parts(self.dropped)}; "
            f"freshly initialised: {parts(self.new)}"
        )


# Names ----------------------------------------------------------------------------------------------------------------


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


# Shapes ---------------------------------------------------------------------------------------------------------------


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


# Reading --------------------------------------------------------------------------------------------------------------


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return f"{', '.join(listed[:3])}{f' and {len(listed) - 3} more' if len(listed) > 3 else ''}"


def _translate(state_dict: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], dict[str, str]]:
    numbers = (int(number) for name in state_dict for number in re.findall(r"\.(\d{1,3})(?=\.)", name))
    known = {foreign_name(name, layout): name for name in _known_names(max(numbers, default=0) + 1)}
    found: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    unknown = []
    for source_name, tensor in state_dict.items():
        name = known.get(_lookup_name(source_name, layout))
        if name is None or name in found:
            unknown.append(source_name)
        else:
            found[name] = _from_foreign(name, source_name, tensor, layout)
            names[name] = source_name
    if unknown:
        v1 = any(re.search(r"\.(\d+)\.(gamma|layer_scale_parameter)$", name) for name in unknown)
        hint = "; layer scale makes this a ConvNeXt V1, which has no GRN" if v1 else ""
        raise CheckpointError(f"{len(unknown)} tensors do not belong to a ConvNeXt V2 ({_some(unknown)}){hint}")
    return found, names


def _count(names: Iterable[str], prefix: str) -> int:
    """One more than the highest index below ``prefix``."""
    indices = {int(name[len(prefix) :].split(".")[0]) for name in names if name.startswith(prefix)}
    return max(indices, default=-1) + 1


def _encoder_config(weights: Mapping[str, Tensor]) -> EncoderConfig:
    """Depths, widths, channels, patch and kernel size from tensors in the dense network's names and shapes."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in weights:
            raise CheckpointError(f"incomplete: {name} is missing")
        if weights[name].dim() != rank:
            raise CheckpointError(f"{name} should have {rank} axes, its shape is {list(weights[name].shape)}")
        return tuple(weights[name].shape)

    stem = shape("downsample_layers.0.0.weight", 4)
    dims = (stem[0], *(shape(f"downsample_layers.{i}.1.weight", 4)[0] for i in range(1, NUM_STAGES)))
    depths = tuple(_count(weights, f"stages.{i}.") for i in range(NUM_STAGES))
    kernel_size = shape("stages.0.0.dwconv.weight", 4)[-1]
    four = tuple[int, int, int, int]
    try:
        return EncoderConfig(
            cast(four, depths), cast(four, dims), stem[1], stem[-1] * 2 ** (NUM_STAGES - 1), kernel_size
        )
    except ValueError as error:
        raise CheckpointError(f"the weights are of no network that we have: {error}") from error


def _decoder_config(encoder: EncoderConfig, decoder: Mapping[str, Tensor]) -> FCMAEConfig:
    if "mask_token" not in decoder:
        raise CheckpointError("incomplete: there is a decoder, but mask_token is missing")
    depth, width = _count(decoder, "decoder."), decoder["mask_token"].numel()
    side = 7 * encoder.patch_size
    try:
        return FCMAEConfig(encoder, (side, side), decoder_depth=depth, decoder_dim=width)
    except ValueError as error:
        raise CheckpointError(f"the decoder is incomplete: {error}") from error


@lru_cache(maxsize=8)
def _expected(module_class: Callable[[Any], nn.Module], config: Config) -> Mapping[str, torch.Size]:
    """Names and shapes of a network's tensors; cached because building one takes seconds for the large variants."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in module_class(config).state_dict().items()}


def _check(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size], names: Mapping[str, str]) -> None:
    missing = expected.keys() - found.keys()
    if missing:
        raise CheckpointError(f"incomplete: {len(missing)} tensors are missing ({_some(missing)})")
    unexpected = found.keys() - expected.keys()
    if unexpected:
        raise CheckpointError(f"{len(unexpected)} tensors too many ({_some(unexpected)})")
    for name, tensor in found.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(f"{names[name]} has the shape {list(tensor.shape)}, expected {list(expected[name])}")


def _check_values(found: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{names[name]} holds {tensor.dtype}; quantised weights cannot be converted")
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{names[name]} holds NaN or infinity: the training that wrote it had diverged")


def read_weights(state_dict: Mapping[str, Tensor]) -> Weights:
    """Weights of any known layout, checked to be complete, of the right shapes and finite.

    Weights of 16 bits are widened to float32, which loses nothing; others keep their dtype.

    Raises:
        CheckpointError: if they are not a whole ConvNeXt V2: the only parts that may be missing are the decoder, and
            the final norm and head.
    """
    layout = detect_layout(state_dict)
    found, names = _translate(state_dict, layout)
    _check_values(found, names)
    groups: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}, "head": {}}
    widened = False
    for name, tensor in found.items():
        first = name.split(".")[0]
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor, widened = tensor.float(), True
        group = "decoder" if first in DECODER_PARTS else "head" if first in HEAD_PARTS else "encoder"
        groups[group][name] = tensor
    encoder, decoder, head = groups.values()
    config = _encoder_config(encoder)
    _check(encoder, _expected(Encoder, config), names)
    if decoder:
        whole = _expected(FCMAE, _decoder_config(config, decoder))
        _check(decoder, {name: value for name, value in whole.items() if not name.startswith("encoder.")}, names)
    if head:
        classes = head["head.weight"].shape[0] if "head.weight" in head else 0
        if "head.bias" in head and not classes:
            raise CheckpointError("incomplete: head.bias without head.weight")
        whole = _expected(ConvNeXtV2, ClassifierConfig(config, classes))
        _check(head, {name: value for name, value in whole.items() if name not in encoder}, names)
    return Weights(layout, config, encoder, decoder, head, names, widened)


def infer_config(state_dict: Mapping[str, Tensor]) -> Config:
    """Configuration read from the weights of any layout.

    Returns:
        An FCMAEConfig if there is a decoder (image size and mask ratio are not in the weights: 7×7 patches and 0.6), a
        ClassifierConfig if there is a final norm, else an EncoderConfig.

    Raises:
        CheckpointError: as :func:`read_weights`.
    """
    return weights_config(read_weights(state_dict))


def weights_config(weights: Weights) -> Config:
    """As :func:`infer_config`, for weights that were read."""
    if weights.decoder:
        return _decoder_config(weights.config, weights.decoder)
    return ClassifierConfig(weights.config, weights.num_classes or 0) if weights.head else weights.config


def read_checkpoint(checkpoint: Checkpoint) -> Weights:
    """:func:`read_weights`, with the file named in errors."""
    try:
        return read_weights(checkpoint.state_dict)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def encoder_state_dict(checkpoint: Checkpoint | str | Path) -> dict[str, Tensor]:
    """The encoder's weights in the dense network's names, from a checkpoint of any layout.

    Raises:
        CheckpointError: as :func:`convnextv2.checkpoint.load_checkpoint` and :func:`read_weights`.
    """
    return read_checkpoint(_as_checkpoint(checkpoint)).encoder


def _as_checkpoint(checkpoint: Checkpoint | str | Path) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)


# Writing and loading --------------------------------------------------------------------------------------------------


def write_layout(weights: Weights, layout: Layout) -> dict[str, Tensor]:
    """State dict in another layout.

    The dense layouts leave the decoder out; ``fcmae`` and ``sparse-official`` leave final norm and head out.
    """
    second = weights.decoder if layout in ("fcmae", "sparse-official") else weights.head
    return {
        foreign_name(name, layout): _to_foreign(name, tensor, layout)
        for name, tensor in (*weights.encoder.items(), *second.items())
    }


def describe(config: EncoderConfig) -> str:
    """The encoder in words, for messages."""
    name = variant_name(config) or "a custom ConvNeXt V2"
    kernel = "" if config.kernel_size == 7 else f", kernel size {config.kernel_size}"
    return (
        f"{name} (depths {'-'.join(map(str, config.depths))}, widths {'-'.join(map(str, config.dims))}, "
        f"{config.in_chans} channels, patch size {config.patch_size}{kernel})"
    )


def init_classifier(model: ConvNeXtV2, checkpoint: Checkpoint | str | Path) -> LoadReport:
    """Start a classifier from the weights of a checkpoint of any layout.

    The whole encoder must be there. The final norm and the head may be missing and then keep their initial values; a
    head with another number of classes, a decoder and a mask token are dropped.

    Returns:
        What was loaded, dropped and left new.

    Raises:
        CheckpointError: if the file cannot be read, or is of another variant: both are named.
    """
    checkpoint = _as_checkpoint(checkpoint)
    weights = read_checkpoint(checkpoint)
    own = replace(model.encoder_config, drop_path_rate=0.0)
    if weights.config != own:
        raise CheckpointError(
            f"{checkpoint.path}: holds {describe(weights.config)}, but the network is {describe(own)}; "
            "choose the model that the checkpoint is of"
        )
    target = model.state_dict()
    state = dict(target)
    loaded, dropped = [], []
    for name, tensor in weights:
        if name in target and target[name].shape == tensor.shape:
            state[name] = tensor
            loaded.append(name)
        else:
            dropped.append(name)
    assert all(name.split(".")[0] in (*DECODER_PARTS, "head") for name in dropped)
    load_strict(model, state, checkpoint.path)
    new = tuple(name for name in target if name not in loaded)
    return LoadReport(checkpoint.path, tuple(loaded), tuple(dropped), new)


def complete_model(checkpoint: Checkpoint, backend: str = "auto") -> FCMAE | ConvNeXtV2:
    """The network of a checkpoint that holds all of it; see :func:`convnextv2.checkpoint.load_model`.

    Raises:
        CheckpointError: if the weights do not fit the configuration, or are an encoder alone.
        BackendUnavailableError: if the backend named cannot run here.
    """
    weights = read_checkpoint(checkpoint)
    config = weights_config(weights) if checkpoint.config is None else checkpoint.config
    model: FCMAE | ConvNeXtV2
    if isinstance(config, FCMAEConfig):
        if backend != "auto":
            get_backend(backend)
        model = FCMAE(config, backend)
    elif isinstance(config, ClassifierConfig):
        model = ConvNeXtV2(config)
    else:
        raise CheckpointError(
            f"{checkpoint.path}: holds an encoder without decoder and without head, so it is no whole network; "
            "start a fine-tuning from it instead"
        )
    load_strict(
        model, write_layout(weights, "fcmae" if isinstance(model, FCMAE) else "official-dense"), checkpoint.path
    )
    return model

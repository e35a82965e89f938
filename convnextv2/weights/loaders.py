"""How a file is loaded where it is going: calls to copy, tried by names and shapes before it is written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from convnextv2.models.config import EncoderConfig, variant_name
from convnextv2.models.pooling import pooling_of
from convnextv2.weights.guard import CheckpointError

OFFICIAL = (32, 7)
"""Patch and kernel size of the official networks, dense and sparse, which have no others."""


def _without_numbers(name: str, **options: Any) -> Any:
    import timm
    from accelerate import init_empty_weights

    with init_empty_weights():  # not torch's meta device: older timm takes drop rates out of a tensor
        return timm.create_model(name, **options)


@lru_cache(maxsize=8)
def timm_model(config: EncoderConfig) -> tuple[str, Mapping[str, Any], bool]:
    """Name and options of ``timm.create_model`` for an encoder, beside ``num_classes``, and whether its linear layers
    then are 1×1 convolutions, as timm has them in its small variants.

    Raises:
        CheckpointError: if timm has no such network.
    """
    import timm

    if config.stem_stride == 2:
        # Timm then adds a downsampling of its own before the first stage.
        raise CheckpointError(
            "timm has no ConvNeXt with a stem of stride 2 (patch size 16); official-dense and sparse-official "
            "hold any patch size, and timm takes their files as models that `import convnextv2.timm` registers"
        )
    options: dict[str, Any] = {}
    for name in filter(timm.is_model, (variant_name(config) or "", "convnextv2_tiny")):
        network = _without_numbers(name, num_classes=0)
        depths, dims = (len(stage.blocks) for stage in network.stages), network.feature_info
        if (*depths, *(stage["num_chs"] for stage in dims)) == config.depths + config.dims:
            break
    else:
        options |= {"depths": config.depths, "dims": config.dims}
    options |= {"in_chans": config.in_chans} if config.in_chans != 3 else {}
    options |= {"patch_size": config.stem_stride} if config.stem_stride != 4 else {}
    options |= {"kernel_sizes": config.kernel_size} if config.kernel_size != 7 else {}
    return name, options, network.stages[0].blocks[0].mlp.fc1.weight.dim() == 4


def _call(state_dict: Mapping[str, Tensor], config: EncoderConfig) -> tuple[str, dict[str, Any]]:
    name, options, _ = timm_model(config)
    classes = state_dict["head.fc.weight"].shape[0] if "head.fc.weight" in state_dict else 0
    return name, {**options, "num_classes": classes}


def registered_name(variant: str, patch_size: int = 32) -> str:
    """A variant's name in timm, of :mod:`convnextv2.timm`: ``fcmae_convnextv2_atto``, ``…_patch16``, ``…_patch8``."""
    return f"fcmae_{variant}" + (f"_patch{patch_size}" if patch_size != OFFICIAL[0] else "")


def registered_call(config: EncoderConfig, classes: int, path: str) -> str:
    """The call of timm that makes the model that :mod:`convnextv2.timm` registers, from a file of any layout."""
    variant = variant_name(config)
    options: dict[str, Any] = {} if variant else {"depths": config.depths, "dims": config.dims}
    options |= {"in_chans": config.in_chans} if config.in_chans != 3 else {}
    options |= {"kernel_sizes": config.kernel_size} if config.kernel_size != OFFICIAL[1] else {}
    name = registered_name(variant or "convnextv2_tiny", config.patch_size)
    shown = {**options, "num_classes": classes, "checkpoint_path": path}
    return f"timm.create_model({name!r}, {', '.join(f'{key}={value!r}' for key, value in shown.items())})"


def load_timm(state_dict: Mapping[str, Tensor], config: EncoderConfig, **options: Any) -> Any:
    """The network that ``timm.create_model`` makes for the encoder's shape, with these weights, loaded strictly, in
    float64; ``options`` stand beside or in place of its own. Raises CheckpointError if timm has no such network, or
    names or shapes do not fit.
    """
    name, own = _call(state_dict, config)
    network = _without_numbers(name, **{**own, **options})
    try:
        network.load_state_dict({key: value.double() for key, value in state_dict.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"timm's {name} does not take the weights: {' '.join(str(error).split())}") from error
    return network.eval()


def timm_loading(state_dict: Mapping[str, Tensor], config: EncoderConfig, path: str) -> list[str]:
    """A layout's ``loading`` for timm; raises what :func:`load_timm` does, and CheckpointError for another pooling."""
    if "head.norm.weight" in state_dict and len(state_dict["head.norm.weight"]) != config.dims[-1]:
        raise CheckpointError(
            "timm pools by the mean alone, and this classifier does not; leave its head out, or export it"
        )
    load_timm({key: value.to("meta") for key, value in state_dict.items()}, config)
    name, options = _call(state_dict, config)
    shown = ", ".join(f"{key}={value!r}" for key, value in {**options, "checkpoint_path": path}.items())
    return [f"load it with: timm.create_model({name!r}, {shown})"]


def official_loading(state_dict: Mapping[str, Tensor], config: EncoderConfig, path: str) -> list[str]:
    """A layout's ``loading`` for the official networks, dense and sparse, and for ours, which take both."""
    sparse = "encoder.downsample_layers.0.0.weight" in state_dict
    parts = {"decoder": "mask_token"} if sparse else {"norm": "norm.weight", "head": "head.weight"}
    absent = " and ".join(part for part, name in parts.items() if name not in state_dict)
    ours, given = ("init_classifier", "model, ") if absent in ("decoder", "norm and head") else ("load_model", "")
    lines = [f"load it with: from convnextv2.weights import {ours}; {ours}({given}{path!r})"]
    if pooling_of(state_dict, config.dims) != "mean":
        return [*lines, "the official networks do not take it: they pool by the mean alone"]
    if (config.patch_size, config.kernel_size) != OFFICIAL:
        classes = state_dict["head.weight"].shape[0] if "head.weight" in state_dict else 0
        return [
            *lines,
            "the official networks do not take it: they have patch size 32 and kernel size 7 alone; timm's do, with "
            f"import convnextv2.timm: {registered_call(config, classes, path)}",
        ]
    pickled = not path.endswith(".safetensors")
    weights = f"torch.load({path!r})['model']" if pickled else f"safetensors.torch.load_file({path!r})"
    strict = f", strict=False), as it is without {absent}" if absent else ")"
    lines.append(f"in the official code: model.load_state_dict({weights}{strict}")
    if not sparse:
        # It gives every tensor of GRN two axes more, prints that the shapes differ, and goes on without.
        lines.append(
            "not with main_finetune.py --finetune, which drops the GRN of dense files: use --to sparse-official"
        )
    else:
        lines.append(
            f"or with main_finetune.py --finetune{f' {shlex.quote(path)}' if pickled else ', written as .pth'}"
        )
    return lines

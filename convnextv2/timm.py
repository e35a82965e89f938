"""Our networks as models of timm: ``import convnextv2.timm`` registers ``fcmae_convnextv2_atto`` and so on there.

They are timm's own ConvNeXt, with a stem for every patch size, and load files of any layout that we read, features
alone too: ``timm.create_model("fcmae_convnextv2_atto", checkpoint_path="dense.safetensors", features_only=True)``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from convnextv2.models.config import PATCH_SIZES, VARIANTS, EncoderConfig
from convnextv2.models.layers import EPS
from convnextv2.weights.guard import CheckpointError
from convnextv2.weights.layout import part_of
from convnextv2.weights.layouts import LAYOUTS, get_layout
from convnextv2.weights.loaders import registered_name
from convnextv2.weights.reading import describe, read_weights
from convnextv2.weights.unwrapping import unwrapped

CONVOLUTIONS = ("convnextv2_atto", "convnextv2_femto", "convnextv2_pico", "convnextv2_nano")
"""Variants whose linear layers are 1×1 convolutions in timm, and so here: both take each other's files."""
OUTPUT_STRIDES = (8, 16, 32)

logger = logging.getLogger(__name__)


class FCMAEConvNeXt(ConvNeXt):
    """Timm's ConvNeXt V2 with our patch sizes; all else of timm's interface is its own.

    ``load_state_dict`` takes files of other layouts beside the network's own names: see :func:`read_any`.

    Args:
        patch_size: pixels a side of a patch, the total stride: 32, 16 or 8. The pyramid's strides are an eighth, a
            quarter, a half and all of it.
        output_stride: where it is below the patch size, later stages are dilated in place of striding, as in timm.
        options: as of timm's ConvNeXt, but for its ``patch_size``, which is the stem's stride, and with one size of
            kernels.

    Raises:
        ValueError: if a size is out of range.
    """

    def __init__(self, patch_size: int = 32, output_stride: int = 32, **options: Any) -> None:
        kernel = options.get("kernel_sizes", 7)
        if not isinstance(kernel, int):
            raise ValueError(f"expected one size as kernel_sizes, for all stages, got {kernel}")
        if patch_size != PATCH_SIZES[0] and options.get("stem_type", "patch") != "patch":
            raise ValueError(f"the stem of type {options['stem_type']!r} is of patch size 32 alone, got {patch_size}")
        config = EncoderConfig(options["depths"], options["dims"], options.get("in_chans", 3), patch_size, kernel)
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride must be one of {OUTPUT_STRIDES}, got {output_stride}")
        finest = PATCH_SIZES[0] * min(output_stride, patch_size) // patch_size
        super().__init__(output_stride=max(finest, OUTPUT_STRIDES[0]), norm_eps=EPS, **options)
        self.encoder_config = config
        own, size = cast(nn.Conv2d, self.stem[0]), config.stem_stride
        if patch_size != PATCH_SIZES[0]:
            place = {"device": own.weight.device, "dtype": own.weight.dtype}
            stem = nn.Conv2d(own.in_channels, own.out_channels, size, size, **cast(Any, place))
            trunc_normal_(stem.weight, std=0.02)
            nn.init.zeros_(cast(Tensor, stem.bias))
            self.stem[0] = stem
            for info in cast(Any, self.feature_info):
                info["reduction"] = info["reduction"] * patch_size // PATCH_SIZES[0]
        self.register_load_state_dict_pre_hook(read_any)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that no optimizer of timm should decay: GRN's."""
        return {name for name, _ in self.named_parameters() if ".grn." in name}


class Features(FeatureGetterNet):
    """The pyramid: feature maps ``[B, C, H/s, W/s]`` of the stages chosen; its ``feature_info`` tells C and s."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_load_state_dict_pre_hook(read_any)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' inner tensors in the backward pass instead of keeping them."""
        cast(FCMAEConvNeXt, self.model).set_grad_checkpointing(enable)


def read_any(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before a load: a state dict of any known layout becomes one in the network's names and shapes, in place.

    Names of the network's own are left as they are. Raises as :func:`translated`.
    """
    given = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    found = translated(given, module)
    for name in given:
        del state_dict[prefix + name]
    state_dict.update({prefix + name: value for name, value in found.items()})


def translated(given: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Weights of any known layout in the names and shapes of one of the networks here; others as they are.

    A decoder is left out, and so are a norm, a head and stages that the network has not. What the file has not is as
    the network has it, which is logged as a warning.

    Raises:
        CheckpointError: if the weights are damaged, incomplete or of another network.
    """
    own = module.state_dict()
    if all(name in own and own[name].shape == value.shape for name, value in given.items()):
        return given
    given = unwrapped(given)
    if not any(layout.recognises(given.keys()) for layout in LAYOUTS.values()):
        return given
    inner, network = ("model.", module.model) if isinstance(module, Features) else ("", module)
    weights, config = read_weights(given), cast(FCMAEConvNeXt, network).encoder_config
    if replace(weights.config, in_chans=config.in_chans) != config:  # channels are timm's to adapt, or to refuse
        raise CheckpointError(
            f"the file holds {describe(weights.config)}, but the network is {describe(config)}; create the model that "
            "the file is of, with its patch_size"
        )
    found = {}
    for name, value in weights:
        target = inner + get_layout("timm").name_of(name)
        if part_of(name) != "decoder" and target in own:
            fits = own[target].numel() == value.numel()
            found[target] = value.reshape(own[target].shape) if fits else value
    norm = found.get(f"{inner}head.norm.weight")
    if norm is not None and norm.numel() != config.dims[-1]:
        raise CheckpointError("the file's classifier pools by mean and deviation, timm's by the mean alone")
    if missing := [name for name in own if name not in found]:
        logger.warning("the file has no %s: left as initialised", ", ".join(missing))
    return {**own, **found}


def _create(name: str, variant: str, patch_size: int, pretrained: bool = False, **options: Any) -> nn.Module:
    depths, dims = VARIANTS[variant]
    usual = {"depths": depths, "dims": dims, "patch_size": patch_size, "conv_mlp": variant in CONVOLUTIONS}
    return build_model_with_cfg(
        FCMAEConvNeXt,
        name,
        pretrained,
        pretrained_filter_fn=translated,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": Features},
        **{**usual, "use_grn": True, "ls_init_value": None, **options},
    )


NAMES = {registered_name(variant, size): (variant, size) for variant in VARIANTS for size in PATCH_SIZES}
"""What is registered: the names to their variants and patch sizes."""
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (224 // size, 224 // size),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "stem.0",
            "classifier": "head.fc",
        }
        for name, (_, size) in NAMES.items()
    }
)


def _entry(name: str, variant: str, patch_size: int) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        return _create(name, variant, options.pop("patch_size", patch_size), pretrained, **options)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{variant} of patch size {patch_size}; options as of :class:`FCMAEConvNeXt`."
    return build


for _name, _shape in NAMES.items():
    globals()[_name] = register_model(_entry(_name, *_shape))

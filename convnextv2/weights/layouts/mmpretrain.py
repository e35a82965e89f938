"""mmpretrain's ``ConvNeXt`` with GRN, as backbone of a classifier, detector or segmenter, or by itself.

Its final norm is the one behind the last stage, ``norm3``; norms behind other stages serve detectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convnextv2.models.config import EncoderConfig
from convnextv2.weights.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor


def _write(name: str, tensor: Tensor, config: EncoderConfig) -> Tensor:
    return tensor.flatten() if ".grn." in name else tensor


LAYOUT = Layout(
    name="mmpretrain",
    about="for its ConvNeXt",
    recognises=lambda names: (
        any(name.endswith("stages.0.0.depthwise_conv.weight") for name in names)
        and any(name.removeprefix("backbone.") == "downsample_layers.0.0.weight" for name in names)
    ),
    names=(
        (r"^head\.", "head.fc."),
        (r"^norm\.", "backbone.norm3."),
        (r"^(stages|downsample_layers)\.", r"backbone.\1."),
        (r"\.dwconv\.", ".depthwise_conv."),
        (r"\.pwconv([12])\.", r".pointwise_conv\1."),
    ),
    spellings=((r"^(stages|downsample_layers|norm3)\.", r"backbone.\1."),),
    leaves=r"(backbone\.)?norm[0-2]\.|(neck|decode_head|auxiliary_head|bbox_head|rpn_head|roi_head|data_preprocessor)\.",
    write=_write,
)

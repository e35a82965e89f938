"""timm's ``convnextv2_*``: atto to nano have 1×1 convolutions (``conv_mlp``) where the others have linear layers.

Files of either kind are read for any variant; what is written is what ``timm.create_model`` makes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from convnextv2.deferred import later
from convnextv2.models.config import EncoderConfig
from convnextv2.weights.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

timm_model = later("convnextv2.weights.loaders", "timm_model")
timm_network = later("convnextv2.weights.evaluators", "timm_network")


def _write(name: str, tensor: Tensor, config: EncoderConfig) -> Tensor:
    if ".grn." in name:
        return tensor.flatten()
    convolutions = timm_model(config)[2]
    return tensor[:, :, None, None] if convolutions and ".pwconv" in name and tensor.dim() == 2 else tensor


LAYOUT = Layout(
    name="timm",
    about="for its convnextv2 models",
    recognises=lambda names: (
        "stem.0.weight" in names and any(name.startswith("stages.0.blocks.0.conv_dw.") for name in names)
    ),
    names=(
        (r"^head\.", "head.fc."),
        (r"^norm\.", "head.norm."),
        (r"^downsample_layers\.0\.", "stem."),
        (r"^stages\.(\d+)\.", r"stages.\1.blocks."),
        (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"\.dwconv\.", ".conv_dw."),
        (r"\.pwconv([12])\.", r".mlp.fc\1."),
        (r"\.grn\.gamma$", ".mlp.grn.weight"),
        (r"\.grn\.beta$", ".mlp.grn.bias"),
    ),
    target=True,
    write=_write,
    dense_features=lambda state_dict, config, images: timm_network(state_dict, config).forward_features(images),
    norm=True,
    loading=later("convnextv2.weights.loaders", "timm_loading"),
)

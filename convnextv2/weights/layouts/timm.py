"""timm's ``convnextv2_*``, built with linear layers; those with 1×1 convolutions (``conv_mlp``) are read, too."""

from convnextv2.weights.evaluators import timm_network
from convnextv2.weights.layout import Layout

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
    write=lambda name, tensor, config: tensor.flatten() if ".grn." in name else tensor,
    dense_features=lambda state_dict, config, images: timm_network(state_dict, config).forward_features(images),
)

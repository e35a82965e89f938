"""transformers' ``ConvNextV2Model`` and ``ConvNextV2ForImageClassification``, with or without their prefix."""

from convnextv2.weights.layout import Layout

_SPELLINGS = (
    (r"\.grn\.gamma$", ".grn.weight"),
    (r"\.grn\.beta$", ".grn.bias"),
    (r"^(embeddings|encoder|layernorm)\.", r"convnextv2.\1."),
)

LAYOUT = Layout(
    name="transformers",
    about="for its ConvNextV2 models",
    recognises=lambda names: any(
        name.removeprefix("convnextv2.") == "embeddings.patch_embeddings.weight" for name in names
    ),
    names=(
        (r"^head\.", "classifier."),
        (r"(^|\.)norm\.", r"\1layernorm."),
        (r"^stages\.(\d+)\.", r"encoder.stages.\1.layers."),
        (r"^downsample_layers\.0\.0\.", "embeddings.patch_embeddings."),
        (r"^downsample_layers\.0\.1\.", "embeddings.layernorm."),
        (r"^downsample_layers\.(\d+)\.", r"encoder.stages.\1.downsampling_layer."),
        *_SPELLINGS,
    ),
    spellings=_SPELLINGS,
    leaves=r"(convnextv2\.)?hidden_states_norms\.",
)

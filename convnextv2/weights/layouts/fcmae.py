"""Our masked autoencoder: the dense network below ``encoder.``, and the decoder."""

from convnextv2.weights.layout import Layout

LAYOUT = Layout(
    name="fcmae",
    about="our masked autoencoder",
    recognises=lambda names: (
        "encoder.downsample_layers.0.0.weight" in names and not any(name.endswith(".dwconv.kernel") for name in names)
    ),
    names=((r"^(stages|downsample_layers)\.", r"encoder.\1."),),
    parts=("encoder", "decoder"),
)

"""The official dense network, which has our names and shapes."""

from convnextv2.deferred import later
from convnextv2.weights.layout import Layout

LAYOUT = Layout(
    name="official-dense",
    about="which is ours as well",
    recognises=lambda names: (
        "downsample_layers.0.0.weight" in names
        and not any(name.endswith((".dwconv.kernel", ".depthwise_conv.weight")) for name in names)
    ),
    target=True,
    dense_features=later("convnextv2.weights.evaluators", "official_dense_features"),
    loading=later("convnextv2.weights.loaders", "official_loading"),
)

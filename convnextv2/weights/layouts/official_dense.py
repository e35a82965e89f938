"""The official dense network, which has our names and shapes."""

from convnextv2.weights.evaluators import official_dense_features
from convnextv2.weights.layout import Layout
from convnextv2.weights.loaders import official_loading

LAYOUT = Layout(
    name="official-dense",
    about="which is ours as well",
    recognises=lambda names: (
        "downsample_layers.0.0.weight" in names
        and not any(name.endswith((".dwconv.kernel", ".depthwise_conv.weight")) for name in names)
    ),
    target=True,
    dense_features=official_dense_features,
    loading=official_loading,
)

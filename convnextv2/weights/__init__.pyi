from convnextv2.weights.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from convnextv2.weights.evaluators import official_sparse_features, timm_network
from convnextv2.weights.layout import Layout
from convnextv2.weights.layouts import detect_layout, get_layout, register_layout
from convnextv2.weights.layouts.sparse_official import map_to_taps, taps_to_map
from convnextv2.weights.loading import LoadReport, complete_model, init_classifier, init_fcmae, load_model, load_strict
from convnextv2.weights.reading import (
    Weights,
    describe,
    encoder_state_dict,
    read_checkpoint,
    read_weights,
    weights_config,
    with_norm,
    write_layout,
)
from convnextv2.weights.verify import Verification, verify_conversion

# The formatter would give every name a line of its own.
__all__ = [
    "Checkpoint", "CheckpointError", "Layout", "LoadReport", "Verification", "Weights", "complete_model", "describe",
    "detect_layout", "encoder_state_dict", "get_layout", "init_classifier",
    "init_fcmae", "load_checkpoint", "load_model", "load_strict", "map_to_taps", "official_sparse_features",
    "read_checkpoint", "read_weights", "register_layout", "save_checkpoint", "taps_to_map", "timm_network",
    "verify_conversion", "weights_config", "with_norm", "write_layout",
]  # fmt: skip

"""Checkpoints, the layouts of other projects, and published weights."""

from convnextv2.deferred import deferred

__getattr__, __dir__, __all__ = deferred(
    __name__,
    {
        "checkpoint": "Checkpoint CheckpointError load_checkpoint save_checkpoint",
        "evaluators": "official_sparse_features timm_network",
        "layout": "Layout",
        "layouts": "detect_layout get_layout register_layout",
        "layouts.sparse_official": "map_to_taps taps_to_map",
        "loading": "LoadReport complete_model init_classifier init_fcmae load_model load_strict",
        "reading": "Weights describe encoder_state_dict read_checkpoint read_weights weights_config "
        "with_norm write_layout",
        "verify": "Verification verify_conversion",
    },
)

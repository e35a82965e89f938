"""What trained networks make of images, and how good their features are."""

from convnextv2.deferred import deferred

__getattr__, __dir__, __all__ = deferred(
    __name__,
    {
        "features": "Features extract_features",
        "frozen": "FrozenEncoder load_encoder",
        "knn": "knn_predict knn_votes",
        "linear": "fit_linear linear_predict",
        "scores": "Scores score",
    },
)

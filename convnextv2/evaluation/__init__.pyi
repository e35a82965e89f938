from convnextv2.evaluation.features import Features, extract_features
from convnextv2.evaluation.frozen import FrozenEncoder, load_encoder
from convnextv2.evaluation.knn import knn_predict, knn_votes
from convnextv2.evaluation.linear import fit_linear, linear_predict
from convnextv2.evaluation.scores import Scores, score

# The formatter would give every name a line of its own.
__all__ = [
    "Features", "FrozenEncoder", "Scores", "extract_features", "fit_linear", "knn_predict", "knn_votes",
    "linear_predict", "load_encoder", "score",
]  # fmt: skip

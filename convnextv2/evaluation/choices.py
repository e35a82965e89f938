"""What can be chosen of evaluation and prediction, and the usual numbers: without torch, for ``--help``."""

from __future__ import annotations

from convnextv2.models.config import POOLINGS

PRECISIONS = ("auto", "no", "bf16", "fp16")
"""Of what a network computes."""
NEIGHBOURS = 20
"""That vote."""
OUTLIER_NEIGHBOURS = 10
"""Whose mean distance says how far out an image is."""
AS_THE_MODEL = "model"
EMBEDDINGS = (*POOLINGS, AS_THE_MODEL)
"""Ways to pool: those of frozen features, and what the classifier's own head is given."""
DTYPES = ("float32", "float16")
"""Of features in a file."""
METHODS = ("pca", "umap")
"""To place features on a map."""

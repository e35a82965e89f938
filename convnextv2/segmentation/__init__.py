"""A class for every pixel: networks for segmentation, their training, prediction and evaluation.

Needs segmentation-models-pytorch: ``pip install 'sparse-fcmae[segment]'``.
"""

from convnextv2.deferred import deferred

__getattr__, __dir__, __all__ = deferred(
    __name__,
    {
        "config": "SegmenterConfig",
        "loading": "LoadedSegmenter init_segmenter load_segmenter",
        "network": "Segmenter",
        "options": "SegmentOptions",
        "training": "SegmentResult segment",
    },
)

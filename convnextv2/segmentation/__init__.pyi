from convnextv2.segmentation.config import SegmenterConfig
from convnextv2.segmentation.loading import LoadedSegmenter, init_segmenter, load_segmenter
from convnextv2.segmentation.network import Segmenter
from convnextv2.segmentation.options import SegmentOptions
from convnextv2.segmentation.training import SegmentResult, segment

# The formatter would give every name a line of its own.
__all__ = [
    "LoadedSegmenter", "SegmentOptions", "SegmentResult", "Segmenter", "SegmenterConfig", "init_segmenter",
    "load_segmenter", "segment",
]  # fmt: skip

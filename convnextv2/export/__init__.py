"""Dense networks in the formats of other programs: onnxruntime, ``torch.export``, transformers.

What timm loads is a layout of weights (:mod:`convnextv2.weights`), or a model of :mod:`convnextv2.timm`.
"""

from convnextv2.deferred import deferred

__getattr__, __dir__, __all__ = deferred(
    __name__,
    {
        "source": "Source source_of",
        "refusal": "ExportError",
        "target": "Target",
        "targets": "TARGETS",
        "writing": "check_place export",
    },
)

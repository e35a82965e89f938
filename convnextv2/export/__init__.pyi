from convnextv2.export.refusal import ExportError
from convnextv2.export.source import Source, source_of
from convnextv2.export.target import Target
from convnextv2.export.targets import TARGETS
from convnextv2.export.writing import check_place, export

__all__ = ["TARGETS", "ExportError", "Source", "Target", "check_place", "export", "source_of"]

from convnextv2.export.target import ExportError, Source, Target, source_of
from convnextv2.export.writing import TARGETS, check_place, export

__all__ = ["TARGETS", "ExportError", "Source", "Target", "check_place", "export", "source_of"]

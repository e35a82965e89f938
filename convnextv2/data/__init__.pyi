from convnextv2.data.build import build_finetune_datasets, build_predict_dataset, build_pretrain_dataset
from convnextv2.data.datasets import ImageDataset, PredictDataset, SequentialDataset
from convnextv2.data.decoding import Wanted
from convnextv2.data.digits import export_digits
from convnextv2.data.folders import scan_images
from convnextv2.data.opening import SourceKind, open_source, register_kind
from convnextv2.data.sources import DataError, FileSource, OpenedSource, Part, SequentialSource, Source
from convnextv2.data.transforms import Augmentation

# The formatter would give every name a line of its own.
__all__ = [
    "Augmentation", "DataError", "FileSource", "ImageDataset", "OpenedSource", "Part", "PredictDataset",
    "SequentialDataset", "SequentialSource", "Source", "SourceKind", "Wanted", "build_finetune_datasets",
    "build_predict_dataset", "build_pretrain_dataset", "export_digits", "open_source", "register_kind", "scan_images",
]  # fmt: skip

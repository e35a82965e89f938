"""From files to batches."""

from convnextv2.deferred import deferred

__getattr__, __dir__, __all__ = deferred(
    __name__,
    {
        "build": "build_finetune_datasets build_predict_dataset build_pretrain_dataset",
        "datasets": "ImageDataset PredictDataset SequentialDataset",
        "decoding": "Wanted",
        "digits": "export_digits",
        "folders": "scan_images",
        "opening": "SourceKind open_source register_kind",
        "sources": "DataError FileSource OpenedSource Part SequentialSource Source",
        "transforms": "Augmentation",
    },
)

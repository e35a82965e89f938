"""ConvNeXt V2 and its sparse masked pre-training, FCMAE."""

from convnextv2.models.classifier import (
    ConvNeXtV2,
    convnextv2_atto,
    convnextv2_base,
    convnextv2_femto,
    convnextv2_huge,
    convnextv2_large,
    convnextv2_nano,
    convnextv2_pico,
    convnextv2_tiny,
    create_model,
)
from convnextv2.models.config import VARIANTS, ClassifierConfig, EncoderConfig, FCMAEConfig
from convnextv2.models.encoder import Block, Encoder
from convnextv2.models.fcmae import FCMAE, FCMAEOutput, create_fcmae

__version__ = "0.1.0"

__all__ = [
    "FCMAE",
    "VARIANTS",
    "Block",
    "ClassifierConfig",
    "ConvNeXtV2",
    "Encoder",
    "EncoderConfig",
    "FCMAEConfig",
    "FCMAEOutput",
    "convnextv2_atto",
    "convnextv2_base",
    "convnextv2_femto",
    "convnextv2_huge",
    "convnextv2_large",
    "convnextv2_nano",
    "convnextv2_pico",
    "convnextv2_tiny",
    "create_fcmae",
    "create_model",
]

from collections.abc import Callable

from convnextv2.models.classifier import ConvNeXtV2
from convnextv2.models.config import VARIANTS, ClassifierConfig, EncoderConfig, FCMAEConfig
from convnextv2.models.encoder import Block, Encoder
from convnextv2.models.fcmae import FCMAE, FCMAEOutput, create_fcmae
from convnextv2.weights.pretrained import create_model

__version__: str

__all__ = [
    "FCMAE", "VARIANTS", "Block", "ClassifierConfig", "ConvNeXtV2", "Encoder", "EncoderConfig", "FCMAEConfig",
    "FCMAEOutput", "create_fcmae", "create_model",
]  # fmt: skip

def __getattr__(name: str) -> Callable[..., ConvNeXtV2]: ...  # convnextv2_atto and so on

"""ConvNeXt V2 and its sparse masked pre-training, FCMAE."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from convnextv2.models.classifier import FACTORIES, ConvNeXtV2, create_model
from convnextv2.models.config import VARIANTS, ClassifierConfig, EncoderConfig, FCMAEConfig
from convnextv2.models.encoder import Block, Encoder
from convnextv2.models.fcmae import FCMAE, FCMAEOutput, create_fcmae

__version__ = "0.1.0"

# The formatter would give every name a line of its own.
__all__ = [
    "FCMAE", "VARIANTS", "Block", "ClassifierConfig", "ConvNeXtV2", "Encoder", "EncoderConfig", "FCMAEConfig",
    "FCMAEOutput", "create_fcmae", "create_model", *VARIANTS,
]  # fmt: skip

globals().update(FACTORIES)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., ConvNeXtV2]: ...  # convnextv2_atto and so on
